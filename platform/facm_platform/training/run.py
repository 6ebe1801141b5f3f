"""The life of a run around the loop: its folder, its one config, its MLflow run, its result."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from facm_core.errors import InvalidInputError, require
from facm_core.models import Architecture
from facm_platform import storage
from facm_platform.cluster import connected
from facm_platform.config import JobResult, as_dict
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.latents import LatentManifest
from facm_platform.latents.inspection import check_small_set
from facm_platform.registry.artifact import WEIGHTS
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)
from facm_platform.training.checkpoint import check_stored
from facm_platform.training.config import LoraConfig, TrainConfig, WorkersConfig
from facm_platform.training.launch import launch
from facm_platform.training.memory import worker_memory
from facm_platform.training.ray_context import MakeContext, RayContext
from facm_platform.training.speed import PEAK, UTILISATION, predicted_seconds, worker_flops
from facm_platform.training.task import TrainingTask

IDENTITY = "run.yaml"

Lineage = Mapping[str, str]
"""Names and hashes of what a run is made from."""


def identity(config: Any, lineage: Lineage) -> str:
    """What makes a run that run and no other: its config, and the hashes of its inputs.

    Not who does the work, nor for how long: the same batches come of any number of workers.
    """
    determining = {name: value for name, value in as_dict(config).items() if name != "workers"}
    del determining["train"]["max_hours"]
    if determining.get("validation"):
        del determining["validation"]["target_fid"]
    return OmegaConf.to_yaml({"config": determining, "made_from": dict(lineage)})


def check_run(run: RunConfig, config: Any, lineage: Lineage) -> str:
    """Folder of the run, after making sure that this config and these inputs may use it.

    Raises:
        InvalidInputError: bad name or storage, MLflow out of reach, the name was used with another
            config or other inputs (shows the difference), or the checkpoint to go on from is
            damaged.
    """
    check_run_name("run.name", run.name)
    folder = storage.join(storage.absolute(run.storage_uri, "run.storage_uri"), run.name)
    storage.check_reachable(folder, "run.storage_uri")
    check_store(run.tracking, embedded_root(run.storage_uri))
    kept, ours = storage.join(folder, IDENTITY), identity(config, lineage)
    if storage.exists(kept) and (theirs := storage.read_text(kept)) != ours:
        lines = difflib.unified_diff(
            theirs.splitlines(), ours.splitlines(), "the run", "this command", lineterm=""
        )
        raise InvalidInputError(
            "run.name",
            run.name,
            "the name is in use for another run:\n" + "\n".join(lines) + "\n",
            "Use another run.name, or the same config and inputs to resume the run",
        )
    last = last_checkpoint(folder)
    if last is not None:
        check_stored(last)
    return folder


def last_checkpoint(folder: str) -> str | None:
    """Address of the one that Ray Train would go on from; None before there is one."""
    kept = storage.join(folder, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    last = None
    if storage.exists(kept):
        last = json.loads(storage.read_text(kept))["latest_checkpoint_result"]
    return last and storage.join(folder, last["checkpoint_dir_name"])


def open_data(data: DataConfig) -> tuple[str, LatentManifest]:
    """Absolute address and manifest of the latent set, which is whole as far as can be told soon.

    Raises:
        InvalidInputError: see `LatentManifest.load` and `check_small_set`.
    """
    uri = storage.absolute(data.uri, "data.uri")
    manifest = LatentManifest.load(uri)
    check_small_set(uri, manifest, "data.uri")
    return uri, manifest


def check_batch(train: TrainConfig, workers: WorkersConfig) -> None:
    """Raise `InvalidInputError` unless workers can share the batches and the replicas."""
    fixed = workers.min in (None, workers.max)
    require(
        train.replicas == 1 or (fixed and workers.max % train.replicas == 0),
        "train.replicas",
        train.replicas,
        f"no divisor of workers.max = {workers.max}, or workers.min = {workers.min} differs",
        "Use a fixed number of workers that it divides, or 1",
    )
    require(
        train.global_batch_size >= workers.max,
        "train.global_batch_size",
        train.global_batch_size,
        f"less than a row for each of workers.max = {workers.max}",
        "Use larger batches or fewer workers",
    )


def cost_estimate(
    architecture: Architecture,
    train: TrainConfig,
    workers: WorkersConfig,
    *,
    teachers: int,
    lora: LoraConfig | None = None,
) -> str:
    """Each worker's memory and work in a step, when there are fewest."""
    count = workers.min or workers.max
    memory = worker_memory(architecture, train, count, teachers=teachers, lora=lora)
    items = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.rows())
    step = worker_flops(architecture, train, count, teachers=teachers, lora=lora)
    work = f"TFLOP a step for each of them: {step / 1e12:,.4g}"
    if workers.gpu and train.precision == "bfloat16":
        work += (
            f", {predicted_seconds(step):,.3g} s at {UTILISATION:.0%} of an H100's "
            f"{PEAK / 1e12:.0f} TFLOP/s, which is assumed"
        )
    return f"MiB for each of {count} workers: {items}\n{work}"


def execute(
    run: RunConfig,
    config: Any,
    workers: WorkersConfig,
    *,
    job: str,
    lineage: Lineage,
    make_task: Callable[[str, str], TrainingTask],
    tags: Mapping[str, str] | None = None,
    make_context: MakeContext = RayContext,
) -> JobResult:
    """Train on the cluster under one MLflow run, and log what came out.

    Args:
        run: Name and place.
        config: The job's whole configuration.
        workers: Ray Train workers.
        job: Name of the job.
        lineage: Of the run; its MLflow run has it as tags.
        make_task: (tracking URI, run id) -> task.
        tags: Of its MLflow run, beside those.
        make_context: See `launch`.
    """
    store = connect_store(run.tracking, embedded_root(run.storage_uri))
    tags = {**lineage, **(tags or {})}
    tracked = open_run(store, run.name, job=job, config=config, tags=tags, resume=True)
    task = make_task(store.uri, tracked.run_id)
    kept = storage.join(task.folder_uri, IDENTITY)
    storage.write_bytes(kept, identity(config, lineage).encode())
    with tracked, connected():
        try:
            metrics = launch(task, workers, make_context)
        finally:
            if storage.list_files(task.skipped_uri):
                with storage.local_copy(task.skipped_uri) as folder:
                    tracked.log_artifact(folder, "skipped")
        with storage.local_copy(task.artifact_uri) as folder:
            tracked.log_artifact(folder, "model")
            # By which those that are made from it name it.
            tracked.set_tags({"model_sha256": storage.file_sha256(folder / WEIGHTS)})
    return JobResult(
        run_id=tracked.run_id, run_name=run.name, artifact_uri=task.artifact_uri, metrics=metrics
    )
