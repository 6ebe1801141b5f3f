"""Single files: read, list, and writes of which nobody ever sees a half."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from pyarrow import fs

from facm_platform.storage.uris import explained, filesystem, is_local, local_path

_UPLOAD_CHUNK_BYTES = 16 << 20


def exists(uri: str) -> bool:
    """Whether `uri` is a file or a folder."""
    store, path = filesystem(uri)
    with explained(uri):
        return bool(store.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """Content of the file `uri`. Raises FileNotFoundError when there is none."""
    store, path = filesystem(uri)
    with explained(uri), store.open_input_file(path) as file:
        return cast(bytes, file.read())


def read_text(uri: str) -> str:
    """Content of the UTF-8 file `uri`. Raises FileNotFoundError when there is none."""
    return read_bytes(uri).decode()


def list_files(uri: str) -> dict[str, int]:
    """Bytes of every file below the folder `uri`, by its name relative to it; {} for no folder."""
    store, path = filesystem(uri)
    try:
        # Not allow_not_found: with it, a bucket that does not exist reads as an empty folder.
        with explained(uri):
            found = store.get_file_info(fs.FileSelector(path, recursive=True))
    except FileNotFoundError:
        return {}
    files = [info for info in found if info.type == fs.FileType.File]
    return {info.path[len(path) :].lstrip("/"): info.size for info in files}


def write_bytes(uri: str, content: bytes) -> None:
    """Make `uri` hold `content`: on a folder by rename, on an object store by one upload."""
    if is_local(uri):
        with explained(uri), _renamed_to(local_path(uri)) as temporary:
            temporary.write_bytes(content)
        return
    store, path = filesystem(uri)
    with explained(uri), store.open_output_stream(path) as remote:
        remote.write(content)


@contextmanager
def output_file(uri: str) -> Iterator[Path]:
    """A local path to write to, which becomes `uri` when the block ends without an exception."""
    if is_local(uri):
        with explained(uri), _renamed_to(local_path(uri)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="facm-") as folder:
        temporary = Path(folder) / "file"
        yield temporary
        upload_file(temporary, uri)


def upload_file(source: Path, uri: str) -> None:
    """Copy the local file `source` to `uri`."""
    if is_local(uri):
        with explained(uri), _renamed_to(local_path(uri)) as temporary:
            shutil.copyfile(source, temporary)
        return
    store, path = filesystem(uri)
    with source.open("rb") as local, explained(uri), store.open_output_stream(path) as remote:
        shutil.copyfileobj(local, remote, _UPLOAD_CHUNK_BYTES)


def delete_file(uri: str) -> None:
    """Remove the file `uri`; no error when there is none."""
    store, path = filesystem(uri)
    try:
        with explained(uri):
            store.delete_file(path)
    except FileNotFoundError:
        return


@contextmanager
def _renamed_to(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name carries the process, so that two writers never share a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
