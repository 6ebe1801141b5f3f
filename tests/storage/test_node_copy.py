"""What many processes of a machine read is fetched once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from facm_platform import storage
from facm_platform.registry import load_artifact
from facm_platform.storage import folders
from tests.faulty_s3 import FaultyS3
from tests.world import World

NAMES = ("a.txt", "b/c.bin")


@pytest.fixture
def counted(
    faulty_s3: Callable[..., FaultyS3],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], int]:
    """An endpoint that counts; a machine of the test's own: ``counted("GET")``."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    proxy = faulty_s3("503", rate=0.0)
    seen: list[str] = []
    next_fault = proxy.next_fault

    def watched(method: str, path: str) -> str:
        # Not the listing of a folder.
        seen.append(method if "list-type" not in path else "LIST")
        return next_fault(method, path)

    monkeypatch.setattr(proxy, "next_fault", watched)
    return seen.count


def write(uri: str, content: bytes) -> None:
    for name in NAMES:
        storage.write_bytes(storage.join(uri, name), content + name.encode())


def read(uri: str) -> list[bytes]:
    with storage.node_copy(uri) as folder:
        return [(folder / name).read_bytes() for name in NAMES]


def test_it_is_fetched_once_and_again_when_it_has_changed(
    counted: Callable[[str], int], bucket: str
) -> None:
    uri = f"{bucket}/folder"
    write(uri, b"old ")
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(read, [uri] * 8))
    assert got == [[b"old a.txt", b"old b/c.bin"]] * 8
    fetched = counted("GET")
    assert 0 < fetched <= 4
    assert read(uri) == got[0]
    assert counted("GET") == fetched
    # Of the same size, in the same second.
    storage.write_bytes(storage.join(uri, "a.txt"), b"new a.txt")
    assert read(uri) == [b"new a.txt", b"old b/c.bin"]
    assert counted("GET") == 2 * fetched


def test_old_copies_are_forgotten(counted: Callable[[str], int], bucket: str) -> None:
    for name in ("one", "other"):
        write(f"{bucket}/{name}", name.encode())
    with storage.node_copy(f"{bucket}/one") as old:
        os.utime(old, (1, 1))
        assert read(f"{bucket}/other")
        assert not old.exists()
    fetched = counted("GET")
    assert read(f"{bucket}/one") == [b"onea.txt", b"oneb/c.bin"]
    assert counted("GET") > fetched


def test_a_folder_that_is_not_there(bucket: str, tmp_path: Path) -> None:
    for uri in (f"{bucket}/nothing", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError), storage.node_copy(uri):
            pass


def test_what_is_local_is_no_copy(tmp_path: Path) -> None:
    with storage.node_copy(str(tmp_path)) as folder:
        assert folder == tmp_path


def test_what_completes_a_folder_is_uploaded_last(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "config.json", "model", "parts/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    order: list[str] = []
    upload = folders.upload_file
    monkeypatch.setattr(
        folders, "upload_file", lambda file, uri: (order.append(uri), upload(file, uri))
    )
    storage.upload_folder(tmp_path, f"{bucket}/all", last="config.json")
    names = ["a", "model", "parts/config", "config.json"]
    assert order == [f"{bucket}/all/{name}" for name in names]
    assert sorted(storage.list_files(f"{bucket}/all")) == sorted(names)


def test_a_teacher_is_fetched_once(
    counted: Callable[[str], int], bucket: str, world: World
) -> None:
    uri = f"{bucket}/teacher"
    storage.upload_folder(Path(world.teacher), uri)
    first = load_artifact(uri)
    fetched = counted("GET")
    assert load_artifact(uri).sha256 == first.sha256
    assert counted("GET") == fetched > 0
