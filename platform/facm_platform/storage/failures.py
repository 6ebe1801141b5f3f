"""What the failures of a store mean to the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import S3TransferRetriesExceededError
from botocore.exceptions import BotoCoreError, ClientError

from facm_core.errors import InvalidInputError

# Patterns of the messages of both clients, with what each means; the first that fits counts.
_S3_FAILURES = (
    (
        r"NO_SUCH_BUCKET|NoSuchBucket",
        "the bucket does not exist",
        "Create the bucket or mend the address",
    ),
    (
        r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId",
        "the access key is unknown",
        "Check AWS_ACCESS_KEY_ID",
    ),
    (
        r"SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch",
        "the secret key is wrong",
        "Check AWS_SECRET_ACCESS_KEY",
    ),
    (
        r"ExpiredToken|TokenRefreshRequired|InvalidToken",
        "the session of the credentials is over",
        "Get new credentials",
    ),
    (
        r"Unable to locate credentials",
        "there are no credentials",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|HTTP status 40[13]|\(40[13]\)",
        "no permission",
        "Check AWS_ACCESS_KEY_ID and the policy of the bucket",
    ),
    (
        r"HTTP status 301|\(301\)|PermanentRedirect|AuthorizationHeaderMalformed",
        "the bucket lies in another region",
        "Set AWS_REGION to the region of the bucket",
    ),
    (
        r"SLOW_DOWN|SlowDown|HTTP status 503|\(503\)",
        "the object store is overloaded",
        "Try again later, or with fewer workers",
    ),
    (
        r"NETWORK_CONNECTION|endpoint URL|SSL validation failed|Max Retries Exceeded",
        "the object store does not answer",
        "Check AWS_ENDPOINT_URL",
    ),
)
_ERRORS_OF_CLIENTS = (
    OSError,
    BotoCoreError,
    Boto3Error,
    ClientError,
    S3TransferRetriesExceededError,
)
_NO_FILE = r"NO_SUCH_KEY|NoSuchKey|\(404\) when calling the HeadObject"


@contextmanager
def explained(uri: str, field: str = "uri") -> Iterator[None]:
    """Turn the storage failures that a user can mend into an `InvalidInputError` with the address.

    A missing file becomes, or stays, a `FileNotFoundError`, one in the way a `FileExistsError`;
    any other failure passes unchanged.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except PermissionError as error:
        raise InvalidInputError(
            field, uri, "no permission", "Check the owner and mode of the folder"
        ) from error
    except _ERRORS_OF_CLIENTS as error:
        if re.search(_NO_FILE, str(error)):
            raise FileNotFoundError(uri) from error
        for pattern, problem, remedy in _S3_FAILURES:
            if re.search(pattern, str(error)):
                raise InvalidInputError(field, uri, problem, remedy) from error
        raise
