"""Addresses: what they mean, and how they join."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from facm_core.errors import require

_ENVIRONMENT = "Set AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment"


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine (``file://`` or no scheme)."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local `uri`, made absolute."""
    path = unquote(urlsplit(uri).path) if uri.startswith("file://") else uri
    return Path(path).absolute()


def bucket_and_key(uri: str, field: str = "uri") -> tuple[str, str]:
    """The bucket and the key, perhaps empty, that ``s3://bucket/key`` names.

    Raises:
        InvalidInputError: not of that form, or with credentials or options inside.
    """
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
    return parts.netloc, unquote(parts.path).strip("/")


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
        bucket_and_key(uri, field)
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


def _is_in_working_dir_package(path: Path) -> bool:
    names = path.parts
    return ("runtime_resources", "working_dir_files") in pairwise(names)
