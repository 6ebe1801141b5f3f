"""A job that is watched while it runs."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.jobs.conftest import command, environment


class Driver:
    """A job that distills, as a process of its own; its progress is read from what it prints.

    Args:
        arguments: Of the job.
        address: Of its Ray cluster.
        folder: Where it runs.
        job: Which one.
    """

    def __init__(
        self, arguments: list[str], address: str, folder: Path, job: str = "distill"
    ) -> None:
        self.output = ""
        self.process = subprocess.Popen(
            command(job, *arguments),
            cwd=folder,
            env=environment() | {"RAY_ADDRESS": address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    @property
    def images_seen(self) -> int:
        """As its last line of progress says."""
        seen = re.findall(r"distill +\d+%  ([\d,]+)/", self.output)
        return int(seen[-1].replace(",", "")) if seen else 0

    @property
    def resumed_at(self) -> int:
        """Where it last began; 0 at the start."""
        found = re.findall(r"resumed at ([\d,]+) images", self.output)
        return int(found[-1].replace(",", "")) if found else 0

    def worker(self, rank: int) -> psutil.Process:
        """The process of a rank, once it has told."""
        pattern = rf"worker {rank} of 2: process (\d+)"
        self.wait_until(lambda: re.search(pattern, self.output) is not None)
        return psutil.Process(int(re.findall(pattern, self.output)[-1]))

    def wait_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not done():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def finish(self) -> None:
        assert self.process.wait(timeout=900) == 0, self.output
        self._reader.join()

    def end(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
