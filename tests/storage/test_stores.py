"""The clients of an object store: their settings, their secrets, and what their failures say."""

import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.config import Config

from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.storage import stores
from tests.faulty_s3 import FaultyS3

URI = "s3://bucket/set"
NOBODY = "http://127.0.0.1:9"


def test_there_is_one_filesystem_of_an_environment(
    object_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = storage.filesystem("s3://bucket/a%20set/")
    assert path == "bucket/a set"
    assert storage.filesystem("s3://other")[0] is store

    monkeypatch.setenv("AWS_ENDPOINT_URL", NOBODY)
    assert storage.filesystem(URI)[0] is not store


def test_nothing_secret_is_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    store, _ = storage.filesystem(URI)
    pickled = pickle.dumps(store)
    assert b"AKIDEXAMPLE" not in pickled
    assert b"wJalrXUtnFEMI" not in pickled
    # The one of the process that unpickles it, which has its retries.
    assert pickle.loads(pickled) is store


def test_the_endpoint_of_s3_comes_first(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"] + "/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOBODY)
    storage.check_reachable(bucket)
    storage.write_bytes(f"{bucket}/a", b"1")
    assert storage.exists(f"{bucket}/a")


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://host", "http://host/store"])
def test_an_endpoint_that_is_none_is_refused(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for use in (storage.check_reachable, storage.exists, storage.read_bytes):
        with pytest.raises(InvalidInputError, match=f"AWS_ENDPOINT_URL = '{endpoint}'.*Give http"):
            use(URI)


def test_the_region_comes_from_the_environment_or_the_profile(
    object_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "config"
    profile.write_text("[default]\nregion = eu-south-2\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    for name, region in (
        ("AWS_REGION", "eu-north-1"),
        ("AWS_DEFAULT_REGION", "eu-west-1"),
        ("none", "eu-south-2"),
    ):
        assert storage.filesystem(URI)[0].region == region
        assert stores.client().meta.region_name == region
        monkeypatch.delenv(name, raising=False)


def test_missing_credentials_are_named(object_store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(InvalidInputError, match="there are no credentials"):
        storage.check_reachable(URI)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("404 NoSuchBucket", "the bucket does not exist. Create the bucket"),
        ("403 AccessDenied", "no permission. Check AWS_ACCESS_KEY_ID"),
        ("403 InvalidAccessKeyId", "the access key is unknown. Check AWS_ACCESS_KEY_ID"),
        ("403 SignatureDoesNotMatch", "the secret key is wrong. Check AWS_SECRET_ACCESS_KEY"),
        ("400 ExpiredToken", "the session of the credentials is over"),
    ],
)
def test_what_the_store_refuses_is_explained(
    answer: str, message: str, faulty_s3: Callable[..., FaultyS3], tmp_path: Path
) -> None:
    faulty_s3("503").plan(itertools.repeat(answer))
    source = tmp_path / "source"
    source.write_bytes(b"1")
    for use in (
        lambda: storage.check_reachable(URI, "data.uri"),
        lambda: storage.list_files(URI),
        lambda: storage.write_bytes(URI, b"1"),
        lambda: storage.create_bytes(URI, b"1"),
        lambda: storage.upload_file(source, URI),
    ):
        with pytest.raises(InvalidInputError, match=f"uri = '{URI}': .*{message}") as caught:
            use()
    assert caught.value.__cause__ is not None


def test_a_refusal_without_a_reason_is_explained(faulty_s3: Callable[..., FaultyS3]) -> None:
    # The answer to HEAD has no body.
    faulty_s3("503").plan(itertools.repeat("403 AccessDenied"))
    for use in (storage.exists, storage.read_bytes, storage.delete_file):
        with pytest.raises(InvalidInputError, match=f"uri = '{URI}': no permission"):
            use(URI)


def test_a_bucket_of_another_region_is_named(faulty_s3: Callable[..., FaultyS3]) -> None:
    faulty_s3("503").plan(itertools.repeat("301 PermanentRedirect"))
    for use in (storage.exists, storage.list_files):
        with pytest.raises(InvalidInputError, match=r"another region. Set AWS_REGION"):
            use(URI)


def test_a_store_that_stays_busy_is_explained(
    faulty_s3: Callable[..., FaultyS3], monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty_s3("503", rate=1)
    monkeypatch.setattr(stores, "_HASTY", Config(retries={"total_max_attempts": 1}))
    with pytest.raises(InvalidInputError, match=r"overloaded. Try again later"):
        storage.check_reachable(URI)
