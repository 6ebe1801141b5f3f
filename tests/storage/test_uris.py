"""Addresses: their forms, and what is refused."""

from pathlib import Path

import pytest

from facm_core.errors import InvalidInputError
from facm_platform import storage


@pytest.mark.parametrize(
    ("uri", "joined"),
    [
        ("s3://bucket/set", "s3://bucket/set/a/b"),
        ("s3://bucket/set/", "s3://bucket/set/a/b"),
        ("s3://bucket", "s3://bucket/a/b"),
        ("/data", "/data/a/b"),
        ("/", "/a/b"),
        ("runs", "runs/a/b"),
    ],
)
def test_join(uri: str, joined: str) -> None:
    assert storage.join(uri, "a", "b") == joined


def test_absolute_means_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert storage.absolute("runs/set") == str(tmp_path / "runs/set")
    assert storage.absolute("/data/set/") == "/data/set"
    assert storage.absolute("file:///data/a%20set") == "/data/a set"
    assert storage.absolute("s3://bucket/set/") == "s3://bucket/set"


def test_a_relative_folder_of_a_submitted_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)

    with pytest.raises(InvalidInputError, match=r"data.uri = 'runs/set'.*Ray deletes.*s3://"):
        storage.absolute("runs/set", "data.uri")
    assert storage.absolute("/data/set", "data.uri") == "/data/set"


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("", "empty"),
        ("ftp://host/set", "not an address of a folder"),
        ("s3://", "not an address of a folder"),
        ("s3://bucket/set?region=x", "options in an address"),
    ],
)
def test_other_forms_are_refused(uri: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=f"output_uri = .*{problem}"):
        storage.absolute(uri, "output_uri")


def test_a_key_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidInputError, match="credentials in an address") as caught:
        storage.absolute("s3://name:SECRET@bucket/set", "output_uri")
    assert "SECRET" not in str(caught.value)
