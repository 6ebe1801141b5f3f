"""The fault drill: whatever is killed at whatever step, the run ends with the very same weights.

A cluster of two nodes with a worker on each, checkpoints in an object store. ``make drill`` takes
ten seeds of every kind; the slow tests one.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from facm_platform import storage
from facm_platform.training.export import export
from tests.conftest import NO_DASHBOARD
from tests.faulty_s3 import FaultyS3
from tests.jobs.conftest import last_line
from tests.jobs.driver import Driver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BATCH, MAY_BE_LOST, IMAGES = 8, 160, 960
SEEDS = int(os.environ.get("DRILL_SEEDS", "1"))
# Each fits one node of one CPU, beside a read task.
WORKER_CPUS = 0.75


class UploadsThatKill(FaultyS3):
    """An object store; once armed, one upload of a checkpoint's file is cut half way."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, repeat(""))
        self._left = 0

    def arm(self, number: int, kill: Callable[[], None]) -> None:
        """Which of those that now come it is, and what happens then."""
        self._left, self._kill = number, kill

    def next_fault(self, method: str, path: str) -> str:
        super().next_fault(method, path)
        if method == "PUT" and "/checkpoint_" in path and self._left:
            self._left -= 1
            if self._left == 0:
                self._kill()
                return "cut request"
        return ""


class DrillSite:
    """The cluster, and what runs leave in the bucket."""

    def __init__(self, bucket: str, folder: Path, data_uri: str, teacher_uri: str) -> None:
        self.runs, self.folder = f"{bucket}/runs", folder
        # Before the cluster, whose workers have its environment.
        self.store = UploadsThatKill(os.environ["AWS_ENDPOINT_URL"])
        os.environ["AWS_ENDPOINT_URL"] = self.store.url
        self._inputs = [f"data.uri={data_uri}", f"teacher.uri={teacher_uri}"]
        head = {"num_cpus": 1} | NO_DASHBOARD
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.add_node()
        self.drivers: list[Driver] = []

    def add_node(self) -> None:
        self.second = self.cluster.add_node(num_cpus=1)

    def announce_loss(self) -> None:
        """As a cloud's notice reaches Ray: two minutes are left."""
        drain = [str(Path(sys.executable).parent / "ray"), "drain-node"]
        drain += ["--address", self.cluster.address, "--node-id", self.second.node_id]
        drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*drain, "--deadline-remaining-seconds", "120"], check=True)

    def lose_node(self) -> None:
        """SIGKILL to its raylet."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def start(self, name: str, *options: str) -> Driver:
        arguments = [
            f"run.name={name}",
            f"run.storage_uri={self.runs}",
            f"run.tracking.uri=sqlite:///{self.folder / 'mlflow.db'}",
            *self._inputs,
            f"train.images={IMAGES}",
            f"train.global_batch_size={BATCH}",
            f"train.max_lost_images={MAY_BE_LOST}",
            f"train.checkpoint_images={MAY_BE_LOST}",
            f"train.log_images={BATCH}",
            "train.keep_checkpoints=3",
            f"workers.cpus={WORKER_CPUS}",
            "workers.stall_seconds=30",
            *options,
        ]
        self.drivers.append(Driver(arguments, self.cluster.address, self.folder))
        return self.drivers[-1]

    def losses(self, name: str) -> dict[int, float]:
        """By images seen, as MLflow has them."""
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        (run,) = client.search_runs(["1"], f"attributes.run_name = '{name}'")
        history = client.get_metric_history(run.info.run_id, "loss")
        return {metric.step: metric.value for metric in history}

    def weights(self, name: str) -> bytes:
        return storage.read_bytes(f"{self.runs}/{name}/artifact/model.safetensors")

    def committed(self, name: str) -> list[str]:
        """Checkpoints that Ray Train lists."""
        state = json.loads(
            storage.read_text(f"{self.runs}/{name}/checkpoint_manager_snapshot.json")
        )
        return [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]

    def stop(self) -> None:
        for driver in self.drivers:
            driver.end()
        self.cluster.shutdown()
        self.store.stop()


@pytest.fixture(scope="module")
def drill(
    tmp_path_factory: pytest.TempPathFactory,
    object_store: None,
    digits_uri: str,
    teacher_uri: str,
) -> Iterator[DrillSite]:
    boto3.client("s3").create_bucket(Bucket="drill")
    folder = tmp_path_factory.mktemp("drill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        drill = DrillSite("s3://drill", folder, digits_uri, teacher_uri)
        try:
            yield drill
        finally:
            drill.stop()


@pytest.fixture(scope="module")
def undisturbed(drill: DrillSite) -> bytes:
    driver = drill.start("undisturbed")
    driver.finish()
    assert driver.resumed_at == 0
    return drill.weights("undisturbed")


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", ["worker-0", "worker-1", "driver", "node", "upload", "hang"])
def test_nothing_is_lost(
    drill: DrillSite,
    undisturbed: bytes,
    kind: str,
    seed: int,
    tmp_path: Path,
) -> None:
    chance = random.Random(f"{kind} {seed}")
    name = f"{kind}-{seed}"
    # Every other run stands still while a checkpoint is written; those between have time for it.
    distance = MAY_BE_LOST if seed % 2 else MAY_BE_LOST // 2
    option = f"train.checkpoint_images={distance}"
    moment = chance.randrange(BATCH, IMAGES - BATCH, BATCH)
    killed_at = 0

    def kill(rank: int = 0) -> None:
        nonlocal killed_at
        killed_at = driver.images_seen
        driver.worker(rank).kill()

    if kind == "upload":
        # There are four or more files of each of six or more checkpoints.
        drill.store.arm(chance.randrange(1, 24), kill)
        driver = drill.start(name, option)
        driver.wait_until(lambda: killed_at > 0)
    else:
        driver = drill.start(name, option)
        driver.wait_until(lambda: driver.images_seen >= moment)
        killed_at = driver.images_seen
        if kind == "driver":
            driver.end()
            driver = drill.start(name, option)
        elif kind == "node":
            drill.lose_node()
            drill.add_node()
        elif kind == "hang":
            driver.worker(1).suspend()
            driver.wait_until(lambda: "behind are the ranks [1]" in driver.output)
        else:
            kill(rank=int(kind[-1]))
    driver.finish()

    lost = killed_at - driver.resumed_at
    print(f"{name}: killed at {killed_at} images, resumed at {driver.resumed_at}: {lost} lost")
    assert last_line(driver.output)["run_name"] == name
    assert drill.weights(name) == undisturbed
    assert lost <= MAY_BE_LOST
    checkpoints = drill.committed(name)
    assert len(checkpoints) == 3
    for checkpoint in checkpoints:
        export(f"{drill.runs}/{name}/{checkpoint}", str(tmp_path / checkpoint))


def test_a_machine_that_goes_with_notice_takes_nothing_along(drill: DrillSite) -> None:
    options = ["train.images=6400", "train.checkpoint_images=6400", "train.max_lost_images=null"]
    driver = drill.start("notice", *options)
    driver.wait_until(lambda: driver.images_seen >= 400)
    drill.announce_loss()
    driver.wait_until(lambda: "a machine is to go; saved" in driver.output)
    drill.lose_node()
    drill.add_node()
    driver.finish()
    (saved,) = re.findall(r"a machine is to go; saved ([\d,]+) images", driver.output)
    assert driver.resumed_at == int(saved.replace(",", "")) > 400


def test_fewer_workers_and_more_again(drill: DrillSite) -> None:
    """2, 1 and 2 workers: the losses of a run of two, with steps slow enough to see it happen."""
    options = ["train.images=128000", "train.global_batch_size=64", "train.log_images=640"]
    options += ["train.checkpoint_images=1280", "train.max_lost_images=null"]
    elastic = drill.start("elastic", *options, "workers.min=1")
    elastic.wait_until(lambda: elastic.images_seen >= 3200)
    assert "worker 1 of 2" in elastic.output
    drill.lose_node()
    elastic.wait_until(lambda: "worker 0 of 1" in elastic.output and elastic.resumed_at > 0)
    shrunk = elastic.resumed_at
    elastic.wait_until(lambda: elastic.images_seen >= shrunk + 3200)
    drill.add_node()
    before = elastic.output.count("worker 1 of 2")
    elastic.wait_until(lambda: elastic.output.count("worker 1 of 2") > before)
    elastic.wait_until(lambda: elastic.resumed_at > shrunk)
    grown = elastic.resumed_at
    elastic.wait_until(lambda: elastic.images_seen >= grown + 3200)
    elastic.process.terminate()
    elastic.process.wait()

    fixed = drill.start("fixed", *options)
    fixed.wait_until(lambda: fixed.images_seen >= grown + 3200)
    fixed.process.terminate()
    fixed.process.wait()
    found, expected = drill.losses("elastic"), drill.losses("fixed")
    common = sorted(found.keys() & expected.keys())
    assert common[-1] >= grown + 2560
    difference = max(abs(found[images] - expected[images]) for images in common)
    print(f"2 -> 1 at {shrunk}, 1 -> 2 at {grown} images: losses differ by {difference:.1e}")
    assert difference < 1e-5
