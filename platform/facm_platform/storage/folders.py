"""Whole folders: a local one to an address, and an address to a local one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from facm_core.errors import require
from facm_platform.storage.failures import explained
from facm_platform.storage.files import list_files, upload_file
from facm_platform.storage.listing import versions
from facm_platform.storage.stores import check_reachable, filesystem
from facm_platform.storage.uris import absolute, is_local, join, local_path

# Asked for one after the other: of the default of 1 MiB, a large file takes too many.
_PIECE_BYTES = 16 << 20

# Copies that nobody has asked for so long are removed by the next who asks for one.
_KEPT_SECONDS = 24 * 3600


def empty_folder(uri: str, field: str = "uri") -> str:
    """The absolute address of a folder in which nothing lies yet.

    Raises:
        InvalidInputError: something does, or the store cannot be reached.
    """
    address = absolute(uri, field)
    check_reachable(address, field)
    empty = not list_files(address)
    require(empty, field, uri, "it is not empty", "Choose another place")
    return address


def upload_folder(source: Path, uri: str, last: str = "") -> None:
    """Copy every file below the local folder `source` to the folder `uri`.

    A file named `last`, which makes the rest complete, comes last.
    """
    for file in sorted(source.rglob("*"), key=lambda file: (file.name == last, file)):
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


@contextmanager
def node_copy(uri: str) -> Iterator[Path]:
    """The folder `uri` on this machine, as `local_copy`; a copy stays for the next who asks.

    For what many processes read, one after the other: it is fetched once a machine, and again when
    an object there has changed.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_local(uri):
        with local_copy(uri) as path:
            yield path
        return
    found = sorted(versions(uri))
    if not found:
        raise FileNotFoundError(uri)
    key = hashlib.sha256(json.dumps([uri, found]).encode()).hexdigest()
    copies = Path(tempfile.gettempdir(), f"facm-copies-{os.getuid()}")
    copies.mkdir(mode=0o700, exist_ok=True)
    kept = copies / key
    with (copies / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_dir():
            part = copies / f"{key}.part"
            shutil.rmtree(part, ignore_errors=True)  # of one who was killed
            with local_copy(uri) as fetched:
                shutil.copytree(fetched, part)
            part.rename(kept)
        os.utime(kept)
    _forget(copies)
    yield kept


def _forget(copies: Path) -> None:
    """What is open in another process stays readable there."""
    for kept in copies.iterdir():
        if kept.is_dir() and time.time() - kept.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(kept, ignore_errors=True)
