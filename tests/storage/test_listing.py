"""Listings in order, the same on a disk and on an object store."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from facm_core.errors import InvalidInputError
from facm_platform.storage.listing import iter_files, iter_names

# Names whose order is another one by folders, by UTF-16 or without regard to case.
TRICKY = (
    "a-b",
    "a/b",
    "a/b-c",
    "a/b.d/e",
    "a/.hidden",
    "a.txt",
    "a0",
    "B",
    "é/ü",
    "\ufffd",
    "\U0001f600",
    "50%/a #1?.txt",
)


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('bucket')}/some/prefix"


def fill(root: str, names: Iterable[str]) -> None:
    """Put a file under each name, as large as its name is long."""
    if root.startswith("s3://"):
        bucket, _, prefix = root.removeprefix("s3://").partition("/")
        client = boto3.client("s3")
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda name: client.put_object(
                        Bucket=bucket, Key=f"{prefix}/{name}", Body=bytes(len(name))
                    ),
                    names,
                )
            )
        return
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(len(name)))


def test_more_than_a_page_comes_in_the_order_of_code_points(root: str) -> None:
    names = [*TRICKY, *(f"{'a' if n % 3 else 'many'}/{n * 7919 % 1009}.bin" for n in range(1009))]
    fill(root, names)

    assert list(iter_files(root)) == [(name, len(name)) for name in sorted(names)]
    assert list(iter_files(f"{root}/")) == list(iter_files(root))


def test_what_lies_directly_in_a_folder(root: str) -> None:
    fill(root, [*TRICKY, *(f"deep/{n}" for n in range(5))])
    expected = {
        name if "/" not in name else name.split("/")[0] + "/" for name in [*TRICKY, "deep/"]
    }

    assert sorted(iter_names(root)) == sorted(expected)


def test_nothing_is_in_a_folder_that_is_not_there_or_is_a_file(root: str) -> None:
    fill(root, ["folder/file", "folder2/other"])

    for uri in (f"{root}/none", f"{root}/folder/file", f"{root}/fold"):
        assert list(iter_files(uri)) == []
        assert list(iter_names(uri)) == []
    assert list(iter_files(f"{root}/folder")) == [("file", len("folder/file"))]


def test_a_whole_bucket_and_the_folders_that_a_console_makes(bucket: str) -> None:
    fill(f"{bucket}/x", ["a", "b/", "b/c"])

    assert list(iter_files(bucket)) == [("x/a", 1), ("x/b/c", 3)]
    assert list(iter_names(bucket)) == ["x/"]
    assert list(iter_files(f"{bucket}/x/b")) == [("c", 3)]
    assert list(iter_names(f"{bucket}/x/b")) == ["c"]


@pytest.mark.usefixtures("object_store")
def test_a_bucket_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"data = 's3://no-such-.*bucket does not exist"):
        next(iter_files("s3://no-such-bucket/images", "data"))
    with pytest.raises(InvalidInputError, match=r"uri = 's3://no-such-.*bucket does not exist"):
        next(iter_names("s3://no-such-bucket"))


def test_a_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no mode of a folder stops.
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InvalidInputError, match=r"uri = .*no permission. Check the owner"):
        next(iter_files(str(tmp_path)))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "real/deep/file").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")

    assert list(iter_files(str(tmp_path))) == [
        ("link/deep/file", 3),
        ("nowhere", 0),
        ("real/deep/file", 3),
    ]
    (tmp_path / "real/deep/up").symlink_to(tmp_path)
    with pytest.raises(InvalidInputError, match=r"link/deep/up.*back to a folder that it lies in"):
        list(iter_files(str(tmp_path)))


def test_a_pipe_is_no_file_and_a_name_must_be_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert list(iter_files(str(tmp_path))) == []

    try:
        (tmp_path / os.fsdecode(b"caf\xe9")).touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(InvalidInputError, match=r"the name is not UTF-8. Rename the file"):
        list(iter_files(str(tmp_path)))
