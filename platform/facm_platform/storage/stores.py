"""Which client answers for an address, and how patient it is.

An object store has two, one of each per process and environment. pyarrow's reads ranges and
lists. boto3's writes whole files, because a stream of pyarrow's that is closed by an exception
leaves what was written so far as a file; and it reads whole files, because pyarrow asks for the
size first and cuts a file that is replaced meanwhile.
"""

from __future__ import annotations

import os
import random
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from pyarrow import fs

from facm_core.errors import require
from facm_platform.storage.failures import explained
from facm_platform.storage.uris import bucket_and_key, is_local, local_path

TRIES = 10
"""Where one request in ten fails, one in 10^10 fails for good. The waits add up to 25 s at most, or
to 111 s when the store asks to slow down."""

_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 30

_PATIENT = Config(
    retries={"mode": "standard", "total_max_attempts": TRIES},
    connect_timeout=_CONNECT_SECONDS,
    read_timeout=_ANSWER_SECONDS,
)
_HASTY = Config(
    retries={"mode": "standard", "total_max_attempts": 5}, connect_timeout=3, read_timeout=5
)

Environment = tuple[tuple[str, str], ...]


def filesystem(uri: str, field: str = "uri") -> tuple[fs.FileSystem, str]:
    """The filesystem that holds `uri`, and the path inside it.

    Raises:
        InvalidInputError: the address is not a local one and not of the form ``s3://bucket/...``,
            or AWS_ENDPOINT_URL is not the address of a server.
    """
    if is_local(uri):
        return fs.LocalFileSystem(), str(local_path(uri))
    path = "/".join(bucket_and_key(uri, field)).rstrip("/")
    with explained(uri, field):
        return _object_store(), path


def client() -> Any:
    """The boto3 client of the object store.

    Raises:
        InvalidInputError: AWS_ENDPOINT_URL is not the address of a server.
    """
    return _client(_environment(), _PATIENT)


def check_reachable(uri: str, field: str = "uri") -> None:
    """Ask the object store for the folder `uri`; nothing to ask for a local address.

    It gives up after half a minute at most, where the other functions may wait for longer.

    Raises:
        InvalidInputError: no such bucket, no permission, or no answer.
    """
    if is_local(uri):
        return
    bucket, key = bucket_and_key(uri, field)
    with explained(uri, field):
        # Not HEAD: its answer has no body, and so no reason.
        _client(_environment(), _HASTY).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)


class _ObjectStore(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """Pickled as nothing at all: who unpickles it gets the one of their own environment.

    pyarrow's own pickle holds the credentials it was given, and forgets the retries.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _object_store, ()


def _object_store() -> fs.S3FileSystem:
    return _filesystem(_environment())


def _environment() -> Environment:
    """All that the clients take from the environment: another one makes new clients."""
    return tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))


@lru_cache(maxsize=1)
def _filesystem(environment: Environment) -> fs.S3FileSystem:
    endpoint = urlsplit(_endpoint(environment) or "https:")
    return _ObjectStore(
        scheme=endpoint.scheme,
        endpoint_override=endpoint.netloc,
        region=_region(environment),
        # Not the standard strategy: pyarrow never gives back the quota of retries that it takes,
        # so that after the first hundred of a process nothing is tried again.
        retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=TRIES),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_ANSWER_SECONDS,
    )


@lru_cache(maxsize=2)
def _client(environment: Environment, config: Config) -> Any:
    # A session of its own: the default one is not safe to use from several threads.
    made = boto3.session.Session().client(
        "s3",
        endpoint_url=_endpoint(environment),
        region_name=_region(environment),
        config=config,
    )
    made.meta.events.register("needs-retry.s3.PutObject", _again_after_conflict)
    return made


def _endpoint(environment: Environment) -> str | None:
    names = dict(environment)
    endpoint = names.get("AWS_ENDPOINT_URL_S3") or names.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return None
    parts = urlsplit(endpoint)
    require(
        parts.scheme in ("http", "https") and parts.netloc != "" and parts.path in ("", "/"),
        "AWS_ENDPOINT_URL",
        endpoint,
        "not the address of a server",
        "Give http://host:port or https://host",
    )
    return endpoint


def _region(environment: Environment) -> str | None:
    names = dict(environment)
    region = names.get("AWS_REGION") or names.get("AWS_DEFAULT_REGION")
    return region or boto3.session.Session().region_name


def _again_after_conflict(
    response: tuple[Any, dict[str, Any]] | None, attempts: int, **_: Any
) -> float | None:
    """Seconds to wait when two conditional writes met: S3 refuses both at times."""
    if response is None or attempts >= TRIES:
        return None
    return random.random() if response[0].status_code == HTTPStatus.CONFLICT else None
