"""An object store that is no bottleneck: `python -m tests.swift_s3`, then benchmark against it.

moto keeps objects in Python and sends 0.1 GB/s. This proxy before it keeps a file of each object
that was asked for, and has the kernel send pieces of that.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from http import HTTPStatus
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import boto3
from moto.server import ThreadedMotoServer

from tests.faulty_s3 import FaultyS3, Forward

BUCKET = "benchmark"


class SwiftS3(FaultyS3):
    """For objects that do not change."""

    def __init__(self, upstream: str, folder: Path) -> None:
        self._store = boto3.client("s3", endpoint_url=upstream)
        self._folder = folder
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        super().__init__(upstream, repeat(""), _FromFiles)

    def file(self, path: str) -> Path:
        """The object at ``/bucket/key``, as a file."""
        bucket, key = unquote(path).removeprefix("/").split("/", 1)
        file = self._folder / bucket / key
        with self._locks[path]:
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                self._store.download_file(bucket, key, str(file))
        return file


class _FromFiles(Forward):
    server: SwiftS3

    def do_GET(self) -> None:
        if "?" in self.path or self.path.count("/") < 2:
            self._forward()
            return
        with self.server.file(self.path).open("rb") as file:
            size = file.seek(0, 2)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, last = (int(edge) for edge in wanted.groups()) if wanted else (0, size - 1)
            last = min(last, size - 1)
            self.send_response_only(HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK)
            self.send_header("Content-Length", str(last + 1 - start))
            self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
            self.end_headers()
            self.connection.sendfile(file, start, last + 1 - start)


if __name__ == "__main__":
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    address = "http://{}:{}".format(*moto.get_host_and_port())
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket=BUCKET)
    with TemporaryDirectory(prefix="swift-s3-") as folder:
        print(f"export AWS_ENDPOINT_URL={SwiftS3(address, Path(folder)).url}  # s3://{BUCKET}")
        threading.Event().wait()
