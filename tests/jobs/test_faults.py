"""Processes that are killed: the run goes on and ends with the very same weights."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs.conftest import command, environment, last_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Driver:
    """A distillation of 120 steps with a checkpoint every 20, as a process of its own."""

    def __init__(self, folder: Path, data_uri: str, teacher_uri: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        arguments = [
            "run.name=student",
            f"run.storage_uri={folder}",
            f"data.uri={data_uri}",
            f"teacher.uri={teacher_uri}",
            "train.images=960",
            "train.global_batch_size=8",
            "train.checkpoint_images=160",
            "train.log_images=80",
        ]
        self.process = subprocess.Popen(
            command("distill", *arguments),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait_for_checkpoints(self, count: int) -> None:
        """Until so many are committed."""
        deadline = time.monotonic() + 300
        while len(list((self.folder / "student").glob("checkpoint_*"))) < count:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """The Ray Train workers, by process id."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return sorted(
            (child for child in children if "RayTrainWorker" in " ".join(child.cmdline())),
            key=lambda child: child.pid,
        )

    def finish(self) -> bytes:
        """Weights, after a normal end."""
        assert self.process.wait(timeout=400) == 0, self.output
        self._reader.join()
        # Ray writes its own lines to the same terminal; the last one is ours.
        assert last_line(self.output)["run_name"] == "student"
        return (self.folder / "student" / "artifact" / "model.safetensors").read_bytes()


@pytest.fixture
def start(digits_uri: str, teacher_uri: str) -> Iterator[Callable[[Path], Driver]]:
    """``start(folder)`` -> a driver; stopped at the end of the test, whatever happened."""
    drivers: list[Driver] = []

    def make(folder: Path) -> Driver:
        drivers.append(Driver(folder, digits_uri, teacher_uri))
        return drivers[-1]

    yield make
    for driver in drivers:
        if driver.process.poll() is None:
            driver.process.terminate()
            driver.process.wait(timeout=60)


def test_killed_worker_and_killed_driver_change_nothing(
    start: Callable[[Path], Driver], tmp_path: Path
) -> None:
    undisturbed = start(tmp_path / "undisturbed").finish()

    with_killed_worker = start(tmp_path / "worker")
    with_killed_worker.wait_for_checkpoints(2)
    workers = with_killed_worker.workers()
    assert len(workers) == 2
    workers[1].kill()
    assert with_killed_worker.finish() == undisturbed
    assert "resumed at" in with_killed_worker.output

    killed = start(tmp_path / "driver")
    killed.wait_for_checkpoints(1)
    killed.process.kill()
    killed.process.wait()
    again = start(tmp_path / "driver")
    assert again.finish() == undisturbed
    assert "resumed at" in again.output
