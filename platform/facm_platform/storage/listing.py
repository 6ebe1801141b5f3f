"""What lies in a folder, however much of it: one name after the other, never all in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import Any

from facm_core.errors import InvalidInputError, require
from facm_platform.storage.failures import explained
from facm_platform.storage.stores import client
from facm_platform.storage.uris import bucket_and_key, is_local, local_path

Inode = tuple[int, int]


def iter_files(uri: str, field: str = "uri") -> Iterator[tuple[str, int]]:
    """Every file below the folder `uri`, hidden ones included: name relative to it, and bytes.

    In the order of the names' code points on either kind of store: ``a-b`` comes before ``a/b``.
    At most a thousand names are in memory at once, but those of one local folder, and of the
    folders that it lies in, always all. Nothing comes where there is no such folder.

    A local file that has just vanished, or to which a link leads in vain, has 0 bytes.

    Raises:
        InvalidInputError: no such bucket, no permission, no answer; a local name that is not
            UTF-8, or a link back to a folder that it lies in.
    """
    with explained(uri, field):
        if is_local(uri):
            yield from _local_files(local_path(uri), "", (), field)
            return
        for prefix, page in _pages(uri, field):
            for found in page.get("Contents", ()):
                name = found["Key"].removeprefix(prefix)
                # Consoles write a folder as an empty object with a slash at its end.
                if name and not name.endswith("/"):
                    yield name, found["Size"]


def iter_names(uri: str, field: str = "uri") -> Iterator[str]:
    """What lies directly in the folder `uri`, in any order; names of folders end in a slash.

    Nothing comes where there is no such folder.

    Raises:
        InvalidInputError: no such bucket, no permission, or no answer.
    """
    with explained(uri, field):
        if is_local(uri):
            yield from _local_names(local_path(uri))
            return
        for prefix, page in _pages(uri, field, Delimiter="/"):
            for found in page.get("CommonPrefixes", ()):
                yield found["Prefix"].removeprefix(prefix)
            for found in page.get("Contents", ()):
                if found["Key"] != prefix:
                    yield found["Key"].removeprefix(prefix)


def versions(uri: str) -> Iterator[tuple[str, str]]:
    """Every object below the ``s3://`` address: name, and a tag that changes with its bytes."""
    with explained(uri):
        for prefix, page in _pages(uri, "uri"):
            for found in page.get("Contents", ()):
                yield found["Key"].removeprefix(prefix), found["ETag"]


def _pages(uri: str, field: str, **options: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The prefix of every key below `uri`, with each thousand of them."""
    bucket, key = bucket_and_key(uri, field)
    prefix = f"{key}/" if key else ""
    paginator = client().get_paginator("list_objects_v2")
    for page in paginator.paginate(Bucket=bucket, Prefix=prefix, **options):
        yield prefix, page


def _local_names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield f"{entry.name}/" if entry.is_dir() else entry.name
    except (FileNotFoundError, NotADirectoryError):
        return


def _local_files(
    folder: Path, prefix: str, above: tuple[Inode, ...], field: str
) -> Iterator[tuple[str, int]]:
    # With their slashes, so that names sort as the whole paths do.
    names = sorted(_local_names(folder))
    if not names:
        return
    status = folder.stat()
    inode = (status.st_dev, status.st_ino)
    require(
        inode not in above,
        field,
        str(folder),
        "a link back to a folder that it lies in",
        "Remove the link",
    )
    for name in names:
        if name.endswith("/"):
            yield from _local_files(folder / name, prefix + name, (*above, inode), field)
        elif (size := _file_bytes(folder / name)) is not None:
            _check_utf8(prefix + name, field)
            yield prefix + name, size


def _file_bytes(path: Path) -> int | None:
    """None for what is no file: to read a pipe or a socket would be to wait for ever."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    return status.st_size if S_ISREG(status.st_mode) else None


def _check_utf8(name: str, field: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        problem, remedy = "the name is not UTF-8", "Rename the file"
        raise InvalidInputError(field, name, problem, remedy) from error
