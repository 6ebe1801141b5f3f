"""Nothing is lost, and nothing half is seen, on an object store where one request in ten fails."""

import itertools
import os
import random
import threading
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facm_core.errors import InvalidInputError
from facm_platform import storage
from tests.faulty_s3 import FaultyS3

MODES = ["503", "cut"]
LARGE_BYTES = (64 << 20) + 1_000_003
"""Just above what is sent in one request."""


def write(uri: str, content: bytes, way: int, folder: Path) -> None:
    if way == 0:
        storage.write_bytes(uri, content)
    elif way == 1:
        source = folder / "source"
        source.write_bytes(content)
        storage.upload_file(source, uri)
    else:
        with storage.output_file(uri) as file:
            file.write_bytes(content)


@pytest.mark.parametrize("mode", MODES)
def test_files_are_written_read_listed_copied_and_deleted(
    bucket: str, tmp_path: Path, faulty_s3: Callable[..., FaultyS3], mode: str
) -> None:
    proxy = faulty_s3(mode, seed=1)
    root = f"{bucket}/set"
    chance = random.Random(0)
    contents = {f"{i % 3}/{i}": chance.randbytes(chance.randrange(200_000)) for i in range(18)}
    contents["0/empty"] = b""

    for i, (name, content) in enumerate(contents.items()):
        write(storage.join(root, name), content, i % 3, tmp_path)

    assert storage.list_files(root) == {name: len(c) for name, c in contents.items()}
    assert {name: storage.read_bytes(storage.join(root, name)) for name in contents} == contents
    with storage.local_copy(root) as copy:
        assert files_below(copy) == contents
        storage.upload_folder(copy, f"{bucket}/copy")
    assert storage.list_files(f"{bucket}/copy") == storage.list_files(root)

    for name in list(contents)[::2]:
        storage.delete_file(storage.join(root, name))
        del contents[name]
        assert not storage.exists(storage.join(root, name))
    assert all(storage.exists(storage.join(root, name)) for name in contents)
    assert storage.list_files(root) == {name: len(c) for name, c in contents.items()}
    assert sum(proxy.injected.values()) > 10


def files_below(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("mode", MODES)
def test_parquet_reads_its_ranges(
    bucket: str, faulty_s3: Callable[..., FaultyS3], mode: str
) -> None:
    numbers = np.random.default_rng(0).standard_normal((4, 100_000))
    table = pa.table({f"c{i}": column for i, column in enumerate(numbers)})
    uri = f"{bucket}/part.parquet"
    with storage.output_file(uri) as file:
        pq.write_table(table, file, row_group_size=2_500, compression="none")

    proxy = faulty_s3(mode, seed=1)
    store, path = storage.filesystem(uri)
    with pq.ParquetFile(path, filesystem=store, pre_buffer=True) as parquet:
        groups = [parquet.read_row_group(i) for i in range(parquet.num_row_groups)]

    assert pa.concat_tables(groups).equals(table)
    assert len(groups) == 40
    assert sum(proxy.injected.values()) > 2


def test_a_file_of_several_parts_goes_there_and_back(
    bucket: str, tmp_path: Path, faulty_s3: Callable[..., FaultyS3]
) -> None:
    proxy = faulty_s3("cut", rate=0)
    content = random.Random(0).randbytes(LARGE_BYTES)
    (tmp_path / "large").write_bytes(content)
    uri = f"{bucket}/large"

    # Its creation, parts and completion; then its size and parts.
    proxy.plan(["cut answer", "", "cut request", "cut answer", "503 SlowDown", "", "cut answer"])
    storage.upload_file(tmp_path / "large", uri)
    assert proxy.injected.total() == 5
    proxy.plan(["cut answer", "", "cut answer", "cut answer", "503 SlowDown"])
    assert storage.read_bytes(uri) == content
    proxy.plan(["", "cut answer", "503 SlowDown"])
    store, path = storage.filesystem(uri)
    with store.open_input_file(path) as file:
        assert file.read() == content
    assert proxy.injected.total() == 11


def test_an_upload_that_fails_half_way_leaves_what_was_there(
    bucket: str, tmp_path: Path, faulty_s3: Callable[..., FaultyS3]
) -> None:
    proxy = faulty_s3("503", rate=0)
    uri = f"{bucket}/large"
    storage.write_bytes(uri, b"old")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGE_BYTES)

    proxy.plan(["", "403 AccessDenied"])
    with pytest.raises(InvalidInputError, match="no permission"):
        storage.upload_file(tmp_path / "large", uri)

    assert storage.read_bytes(uri) == b"old"
    assert storage.list_files(bucket) == {"large": 3}
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    assert "Uploads" not in uploads


def test_an_answer_that_is_always_cut_is_no_short_file(
    bucket: str, faulty_s3: Callable[..., FaultyS3]
) -> None:
    uri = f"{bucket}/a"
    storage.write_bytes(uri, bytes(1000))
    faulty_s3("cut", rate=0).plan(["", *["cut answer"] * 10])
    with pytest.raises(InvalidInputError, match=f"uri = '{uri}': the object store does not answer"):
        storage.read_bytes(uri)


def test_thousands_of_files_are_listed(bucket: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    names = [f"{i:05}" for i in range(1_050)]
    endpoint = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    connection = HTTPConnection(endpoint.hostname or "", endpoint.port)
    for name in names:
        connection.request("PUT", f"/{bucket.removeprefix('s3://')}/set/{name}", name.encode())
        connection.getresponse().read()
    connection.close()

    proxy = faulty_s3("503", rate=0)
    # Two pages, each of which fails at first.
    proxy.plan(["cut answer", "", "503 SlowDown"])
    assert storage.list_files(f"{bucket}/set") == dict.fromkeys(names, 5)
    assert proxy.injected.total() == 2


def test_a_file_replaced_while_it_is_read_is_the_old_or_the_new_one(bucket: str) -> None:
    uri = f"{bucket}/state"
    versions = [b"a" * 100, b"b" * 100_000]
    storage.write_bytes(uri, versions[0])
    done = threading.Event()

    def replace() -> None:
        for version in itertools.cycle(versions):
            if done.is_set():
                return
            storage.write_bytes(uri, version)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = {storage.read_bytes(uri) for _ in range(60)}
    finally:
        done.set()
        writer.join()
    assert seen == set(versions)


def test_the_retries_of_a_process_do_not_run_out(
    bucket: str, faulty_s3: Callable[..., FaultyS3]
) -> None:
    storage.write_bytes(f"{bucket}/a", b"1")
    proxy = faulty_s3("503", rate=0)
    proxy.plan(["503 SlowDown", ""] * 150)
    assert all(storage.exists(f"{bucket}/a") for _ in range(150))
    assert proxy.injected.total() == 150
