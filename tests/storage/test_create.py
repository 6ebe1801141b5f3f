"""`create_bytes`: of several writers exactly one wins."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from facm_platform import storage
from tests.faulty_s3 import FaultyS3

WRITERS = 8
RACE = """
import sys
from facm_platform import storage
root, ours = sys.argv[1:]
for i in range(20):
    try:
        storage.create_bytes(f"{root}/{i}", ours.encode() * 1000)
        print(i)
    except FileExistsError:
        pass
"""


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, faulty_s3: Callable[..., FaultyS3]) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    bucket = request.getfixturevalue("bucket")
    faulty_s3("cut", seed=3)
    return f"{bucket}/store"


def test_of_many_threads_one_wins(root: str) -> None:
    contents = [bytes([65 + i]) * 10_000 for i in range(WRITERS)]
    start = threading.Barrier(WRITERS)

    def create(uri: str, content: bytes) -> bool:
        start.wait()
        try:
            storage.create_bytes(uri, content)
        except FileExistsError:
            return False
        return True

    for i in range(6):
        uri = storage.join(root, str(i))
        with ThreadPoolExecutor(WRITERS) as writers:
            won = list(writers.map(create, [uri] * WRITERS, contents))
        assert won.count(True) == 1
        assert storage.read_bytes(uri) == contents[won.index(True)]
    assert storage.list_files(root) == {str(i): 10_000 for i in range(6)}


def test_of_several_processes_one_wins(root: str) -> None:
    command = [sys.executable, "-c", RACE, root]
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    writers = [
        subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE) for name in "AB"
    ]
    won = [writer.communicate()[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]

    assert sorted(int(i) for names in won for i in names) == list(range(20))
    for name, numbers in zip("AB", won, strict=True):
        for i in numbers:
            assert storage.read_bytes(f"{root}/{i.decode()}") == name.encode() * 1000


def test_what_is_there_stays(root: str) -> None:
    uri = f"{root}/a"
    storage.create_bytes(uri, b"first")
    for content in (b"first", b"second"):
        with pytest.raises(FileExistsError):
            storage.create_bytes(uri, content)
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_files(root) == {"a": 5}


def test_a_lost_answer_is_understood(bucket: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    proxy = faulty_s3("cut", rate=0)
    uri = f"{bucket}/a"

    proxy.plan(["cut answer"])
    storage.create_bytes(uri, b"first")
    assert storage.read_bytes(uri) == b"first"

    proxy.plan(["cut answer"])
    with pytest.raises(FileExistsError):
        storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert proxy.injected == {"cut answer": 2}


def test_a_conflict_is_tried_again(bucket: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    proxy = faulty_s3("503", rate=0)
    proxy.plan(["409 ConditionalRequestConflict"] * 2)
    storage.create_bytes(f"{bucket}/a", b"first")
    assert storage.read_bytes(f"{bucket}/a") == b"first"
    assert proxy.injected.total() == 2
