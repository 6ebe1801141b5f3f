"""Files and folders, the same on a disk and on an object store."""

import socket
from pathlib import Path

import pytest

from facm_core.errors import InvalidInputError
from facm_platform import storage


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('bucket')}/some/prefix"


def test_what_is_written_is_read_listed_and_deleted(root: str) -> None:
    assert storage.list_files(root) == {}

    storage.write_bytes(storage.join(root, "a.txt"), "ä".encode())
    storage.write_bytes(storage.join(root, "b/c.bin"), bytes(1000))
    storage.write_bytes(storage.join(root, "a.txt"), "äö".encode())

    assert storage.read_text(storage.join(root, "a.txt")) == "äö"
    assert storage.list_files(root) == {"a.txt": 4, "b/c.bin": 1000}
    assert storage.exists(storage.join(root, "b"))
    assert storage.exists(storage.join(root, "b/c.bin"))
    assert not storage.exists(storage.join(root, "c"))

    storage.delete_file(storage.join(root, "a.txt"))
    storage.delete_file(storage.join(root, "a.txt"))
    assert storage.list_files(root) == {"b/c.bin": 1000}
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "a.txt"))


def test_a_write_that_fails_leaves_what_was_there(root: str) -> None:
    uri = storage.join(root, "a")
    storage.write_bytes(uri, b"old")

    def fail() -> None:
        with storage.output_file(uri) as file:
            file.write_bytes(b"ne")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_files(root) == {"a": 3}

    with storage.output_file(uri) as file:
        file.write_bytes(b"new")
        assert storage.read_bytes(uri) == b"old"
        assert storage.list_files(root) == {"a": 3}
    assert storage.read_bytes(uri) == b"new"


def test_a_folder_goes_there_and_back(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "one").write_bytes(b"1")
    (source / "deep/two").write_bytes(bytes(range(256)) * 100)

    storage.upload_folder(source, root)

    with storage.local_copy(root) as copy:
        found = {
            f.relative_to(copy).as_posix(): f.read_bytes() for f in copy.rglob("*") if f.is_file()
        }
    assert found == {"one": b"1", "deep/two": bytes(range(256)) * 100}
    with pytest.raises(FileNotFoundError), storage.local_copy(storage.join(root, "none")):
        pass


def test_a_local_folder_is_its_own_copy(tmp_path: Path) -> None:
    with storage.local_copy(f"file://{tmp_path}") as copy:
        assert copy == tmp_path


@pytest.mark.usefixtures("object_store")
def test_a_bucket_that_does_not_exist_is_named() -> None:
    uri = "s3://no-such-bucket/set"
    for use in (
        lambda: storage.check_reachable(uri, "uri"),
        lambda: storage.list_files(uri),
        lambda: storage.write_bytes(f"{uri}/a", b"1"),
    ):
        with pytest.raises(InvalidInputError, match=r"uri = 's3://no-such-.*bucket does not exist"):
            use()


def test_an_endpoint_that_does_not_answer_is_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(InvalidInputError, match=r"does not answer. Check AWS_ENDPOINT_URL"):
            storage.check_reachable(f"{bucket}/set", "data.uri")


def test_a_folder_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no mode of a folder stops.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InvalidInputError, match=r"no permission. Check the owner"):
        storage.write_bytes(f"{tmp_path}/set/a", b"1")


def test_a_copy_of_a_single_file_keeps_its_name(root: str) -> None:
    uri = storage.join(root, "folder", "weights.pt")
    storage.write_bytes(uri, b"content")
    with storage.local_copy(uri) as copy:
        assert copy.name == "weights.pt"
        assert copy.read_bytes() == b"content"
