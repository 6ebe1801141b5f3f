"""Addresses: what they mean, how they join, and what their failures mean to the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from facm_core.errors import InvalidInputError, require

_ENVIRONMENT = "Set AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment"

# Pieces of the S3 client's messages, with what each means to the user.
_S3_FAILURES = (
    ("NO_SUCH_BUCKET", "the bucket does not exist", "Create the bucket or mend the address"),
    ("ACCESS_DENIED", "no permission", "Check AWS_ACCESS_KEY_ID and the policy of the bucket"),
    ("INVALID_ACCESS_KEY_ID", "the access key is unknown", "Check AWS_ACCESS_KEY_ID"),
    ("SIGNATURE_DOES_NOT_MATCH", "the secret key is wrong", "Check AWS_SECRET_ACCESS_KEY"),
    ("HTTP status 401", "no permission", "Check AWS_ACCESS_KEY_ID and the policy of the bucket"),
    ("HTTP status 403", "no permission", "Check AWS_ACCESS_KEY_ID and the policy of the bucket"),
    ("NETWORK_CONNECTION", "the object store does not answer", "Check AWS_ENDPOINT_URL"),
)


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine (``file://`` or no scheme)."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local `uri`, made absolute."""
    path = unquote(urlsplit(uri).path) if uri.startswith("file://") else uri
    return Path(path).absolute()


def join(uri: str, *names: str) -> str:
    """The address of something inside the folder `uri`."""
    return "/".join([uri.rstrip("/"), *names])


def absolute(uri: str, field: str = "uri") -> str:
    """`uri` in a form that means the same to every process: an absolute path or ``s3://...``.

    Raises:
        InvalidInputError: empty, of an unknown scheme, with credentials inside, or a relative
            folder of a job's unpacked working directory, which Ray deletes after the job.
    """
    require(uri != "", field, uri, "the address is empty", "Give a folder or an s3:// address")
    if not is_local(uri):
        _check_remote(uri, field)
        return uri.rstrip("/")
    path = local_path(uri)
    is_relative = not uri.startswith("file://") and not Path(uri).is_absolute()
    require(
        not (is_relative and _is_in_working_dir_package(path)),
        field,
        uri,
        "a relative folder of a submitted job lies in the package that Ray deletes afterwards",
        "Give an absolute path or an s3:// address",
    )
    return str(path)


def filesystem(uri: str, field: str = "uri") -> tuple[fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it.

    Raises:
        InvalidInputError: the address is not a local one and not of the form ``s3://bucket/...``.
    """
    if is_local(uri):
        return fs.LocalFileSystem(), str(local_path(uri))
    _check_remote(uri, field)
    with explained(uri, field):
        found, path = fs.FileSystem.from_uri(uri.rstrip("/"))
    return found, path


def check_reachable(uri: str, field: str = "uri") -> None:
    """Ask the object store for the bucket of `uri`; nothing to ask for a local address.

    Raises:
        InvalidInputError: no such bucket, no permission, or no answer.
    """
    if is_local(uri):
        return
    store, path = filesystem(uri, field)
    with explained(uri, field):
        bucket = store.get_file_info(path.split("/", 1)[0])
    require(
        bucket.type != fs.FileType.NotFound,
        field,
        uri,
        "the bucket does not exist",
        "Create the bucket or mend the address",
    )


@contextmanager
def explained(uri: str, field: str = "uri") -> Iterator[None]:
    """Turn the storage failures that a user can mend into an `InvalidInputError` with the address.

    A missing file stays a `FileNotFoundError`; any other failure passes unchanged.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise InvalidInputError(
            field, uri, "no permission", "Check the owner and mode of the folder"
        ) from error
    except OSError as error:
        for piece, problem, remedy in _S3_FAILURES:
            if piece in str(error):
                raise InvalidInputError(field, uri, problem, remedy) from error
        raise


def _check_remote(uri: str, field: str) -> None:
    parts = urlsplit(uri)
    require(
        parts.scheme == "s3" and parts.netloc != "",
        field,
        uri,
        "not an address of a folder",
        "Give a path, file:///... or s3://bucket/...",
    )
    # Not shown: what stands before the @ is a secret.
    shown = f"s3://...@{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"
    require("@" not in parts.netloc, field, shown, "credentials in an address", _ENVIRONMENT)
    require(not parts.query, field, uri, "options in an address", _ENVIRONMENT)


def _is_in_working_dir_package(path: Path) -> bool:
    names = path.parts
    return ("runtime_resources", "working_dir_files") in pairwise(names)
