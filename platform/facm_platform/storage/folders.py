"""Whole folders: a local one to an address, and an address to a local one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from facm_platform.storage.failures import explained
from facm_platform.storage.files import upload_file
from facm_platform.storage.stores import filesystem
from facm_platform.storage.uris import is_local, join, local_path

# Asked for one after the other: of the default of 1 MiB, a large file takes too many.
_PIECE_BYTES = 16 << 20


def upload_folder(source: Path, uri: str) -> None:
    """Copy every file below the local folder `source` to the folder `uri`."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            upload_file(file, join(uri, file.relative_to(source).as_posix()))


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The file or folder `uri` on this machine: itself when local, else a temporary copy.

    Raises:
        FileNotFoundError: there is neither.
    """
    if is_local(uri):
        path = local_path(uri)
        if not path.exists():
            raise FileNotFoundError(uri)
        yield path
        return
    store, path_in_store = filesystem(uri)
    with tempfile.TemporaryDirectory(prefix="facm-") as folder:
        # Under its own name, whose suffix may say what it is.
        target = Path(folder, path_in_store.rsplit("/", 1)[-1])
        with explained(uri):
            kind = store.get_file_info(path_in_store).type
            if kind == fs.FileType.NotFound:
                raise FileNotFoundError(uri)
            if kind == fs.FileType.Directory:
                target.mkdir()
            fs.copy_files(
                path_in_store, str(target), store, fs.LocalFileSystem(), chunk_size=_PIECE_BYTES
            )
        yield target
