"""Whole folders: a local one to an address, and an address to a local one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from facm_platform.storage.files import upload_file
from facm_platform.storage.uris import explained, filesystem, is_local, join, local_path


def upload_folder(source: Path, uri: str) -> None:
    """Copy every file below the local folder `source` to the folder `uri`."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            upload_file(file, join(uri, file.relative_to(source).as_posix()))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local folder with the files of the folder `uri`: itself when local, else a temporary copy.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if is_local(uri):
        path = local_path(uri)
        if not path.is_dir():
            raise FileNotFoundError(uri)
        yield path
        return
    store, path_in_store = filesystem(uri)
    with tempfile.TemporaryDirectory(prefix="facm-") as folder:
        with explained(uri):
            if store.get_file_info(path_in_store).type != fs.FileType.Directory:
                raise FileNotFoundError(uri)
            fs.copy_files(path_in_store, folder, store, fs.LocalFileSystem())
        yield Path(folder)
