"""Single files: read, list, and writes of which nobody ever sees a half."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError
from pyarrow import fs

from facm_platform.storage.failures import explained
from facm_platform.storage.stores import TRIES, client, filesystem
from facm_platform.storage.uris import bucket_and_key, is_local, local_path

# Few threads: each failed request of a client takes from one quota of retries, which three
# threads cannot use up.
_TRANSFER = TransferConfig(
    multipart_threshold=64 << 20,
    multipart_chunksize=64 << 20,
    max_concurrency=3,
    num_download_attempts=TRIES,
)

SMALL_BYTES = 256 << 20
"""So much is read within seconds, and can be looked at before a job starts."""


def exists(uri: str) -> bool:
    """Whether `uri` is a file or a folder."""
    store, path = filesystem(uri)
    with explained(uri):
        return bool(store.get_file_info(path).type != fs.FileType.NotFound)


def file_sha256(file: Path) -> str:
    """Hash of a file of this machine."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_bytes(uri: str) -> bytes:
    """Content of the file `uri`: all of what one writer wrote, also while another one writes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with explained(uri):
        if is_local(uri):
            return local_path(uri).read_bytes()
        content = io.BytesIO()
        client().download_fileobj(*bucket_and_key(uri), content, Config=_TRANSFER)
        return content.getvalue()


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
    return {
        info.path[len(path) :].lstrip("/"): info.size
        for info in files
        if not _is_temporary(info.base_name)
    }


def write_bytes(uri: str, content: bytes) -> None:
    """Make `uri` hold `content`: on a folder by rename, on an object store by one upload."""
    with explained(uri):
        if is_local(uri):
            with _renamed_to(local_path(uri)) as temporary:
                temporary.write_bytes(content)
        else:
            bucket, key = bucket_and_key(uri)
            client().put_object(Bucket=bucket, Key=key, Body=content)


def create_bytes(uri: str, content: bytes) -> None:
    """Make `uri` hold `content` if there is nothing yet: of several writers, one wins.

    An object store must know ``If-None-Match``. When the answer to a write was lost, the next try
    finds a file: with `content` in it, it counts as ours, so that writers of equal contents may
    then all win.

    Raises:
        FileExistsError: `uri` is there already.
    """
    with explained(uri):
        if is_local(uri):
            with _temporary(path := local_path(uri)) as temporary:
                temporary.write_bytes(content)
                _sync(temporary)
                os.link(temporary, path)
            return
        bucket, key = bucket_and_key(uri)
        try:
            client().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except ClientError as error:
            answer = error.response["ResponseMetadata"]
            # Not the code: it comes in the body, which may be cut.
            if answer["HTTPStatusCode"] != HTTPStatus.PRECONDITION_FAILED:
                raise
            if answer["RetryAttempts"] == 0 or read_bytes(uri) != content:
                raise FileExistsError(uri) from error


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
    with explained(uri):
        if is_local(uri):
            with _renamed_to(local_path(uri)) as temporary:
                shutil.copyfile(source, temporary)
        else:
            client().upload_file(str(source), *bucket_and_key(uri), Config=_TRANSFER)


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
    with _temporary(path) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A path beside `path`, of a name that no other writer uses; removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
