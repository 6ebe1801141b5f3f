"""A training task on Ray Train V2."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, cast

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal import constants
from ray.train.v2.api.validation_config import ValidationConfig

from facm_platform.cluster import grows, require_cpus
from facm_platform.latents.source import READ_TASK_CPUS
from facm_platform.storage import filesystem
from facm_platform.training.config import WorkersConfig
from facm_platform.training.gauges import CheckpointClock
from facm_platform.training.loop import train
from facm_platform.training.memory import out_of_memory
from facm_platform.training.ray_context import MakeContext, RayContext
from facm_platform.training.task import Hopeless, TrainingTask
from facm_platform.training.validation import measure

# A failed controller is started again this often; Ray's default is without end.
_CONTROLLER_FAILURES = 3

# What ranks tell each other lies in the machine's memory, and with train.offload their shards too.
_GPU_BACKEND = "cpu:gloo,cuda:nccl"

_ADDRESS = "RAY_ADDRESS"


def launch(
    task: TrainingTask, workers: WorkersConfig, make_context: MakeContext = RayContext
) -> dict[str, float]:
    """Run `task` on the connected cluster, resuming from its last checkpoint.

    Args:
        task: The run.
        workers: Who does the work.
        make_context: Makes the loop's world, in each worker.

    Returns:
        Final metrics, from rank 0.

    Raises:
        InvalidInputError: the workers do not fit, or the last checkpoint is damaged.
        FloatingPointError: too many steps in a row were not finite.
        ray.train.TrainingFailedError: the workers failed more often than allowed.
    """
    fewest = workers.min or workers.max
    elastic = fewest < workers.max
    validation = task.validation
    spare = READ_TASK_CPUS + (validation.cpus if validation else 0)
    require_cpus("workers", fewest * workers.cpus, spare)
    # How often the controller looks at its workers, which is what a checkpoint's report waits for.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # A new machine with GPUs takes minutes to come, and a scarce one longer.
    patience = "1800" if grows() else "120"
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", patience)
    folder, _, name = task.folder_uri.rpartition("/")
    # Ours, because Ray's own gives up on an object store within seconds.
    store, path = filesystem(folder)
    trainer = TorchTrainer(
        cast(Any, _work),  # typed for Train V1, which returned nothing
        train_loop_config={"task": task, "workers": workers, "make_context": make_context},
        torch_config=TorchConfig(
            backend=_GPU_BACKEND if workers.gpu else "gloo",
            # Beyond the watchdog, which knows more to say.
            timeout_s=math.ceil(2 * workers.stall_seconds),
        ),
        scaling_config=ScalingConfig(
            # Typed for Train V1, which was not elastic.
            num_workers=cast(Any, (fewest, workers.max)) if elastic else workers.max,
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": 1} if workers.gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=store,
            # Ray Train keeps the last one too, from which a run is resumed.
            checkpoint_config=CheckpointConfig(
                num_to_keep=task.train.keep_checkpoints,
                checkpoint_score_attribute=validation.metric if validation else None,
                checkpoint_score_order="min",
            ),
            failure_config=FailureConfig(
                max_failures=workers.max_failures,
                controller_failure_limit=_CONTROLLER_FAILURES,  # type: ignore[call-arg]
            ),
            callbacks=[CheckpointClock(task)],  # type: ignore[list-item]  # typed for Train V1
        ),
        validation_config=_validation_config(task),
    )
    with _known_address():
        result = trainer.fit()
    # Not result.metrics: that holds only what was reported with a checkpoint.
    outcome: dict[str, float] | Exception = cast(Any, result).return_value
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@contextmanager
def _known_address() -> Iterator[None]:
    """Tell Ray Train's processes which Ray they are of.

    The one that clears up after a dead controller looks for any Ray on the machine. Where there is
    a second one, it was seen to ask that, which knows of no such controller, and to end the run.
    """
    before = os.environ.get(_ADDRESS)
    # Private, but there is no other way to their environment.
    added = _ADDRESS not in constants.ENV_VARS_TO_PROPAGATE
    constants.ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if added:
            constants.ENV_VARS_TO_PROPAGATE.remove(_ADDRESS)
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before


def _validation_config(task: TrainingTask) -> ValidationConfig | None:
    if task.validation is None:
        return None
    how = {
        "num_cpus": task.validation.cpus,
        "num_gpus": int(task.validation.gpu),
        # Else, in a trial of Ray Tune's, in the place that was reserved for its driver.
        "scheduling_strategy": "DEFAULT",
    }
    return ValidationConfig(partial(measure, task), ray_remote_kwargs=how)


def _work(config: dict[str, Any]) -> dict[str, float] | Exception:
    """What every worker runs. Ray Train has set up the process group.

    An error that no second try would mend is a result: Ray Train would begin again.
    """
    task, workers = config["task"], config["workers"]
    torch.set_num_threads(workers.threads)
    # The root too: Train names one of its loggers by a file's path.
    for name in ("", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with closing(config["make_context"](task, workers.stall_seconds)) as context:
            place = f"process {os.getpid()} on {socket.gethostname()}"
            print(f"worker {context.rank} of {context.world_size}: {place}", flush=True)
            return train(task, context)
    except torch.OutOfMemoryError as error:
        # Of this rank alone: the others wait for it, and end when it does.
        architecture, count = task.artifact.architecture, context.world_size
        raise out_of_memory(
            error, architecture, task.train, count, teachers=task.teachers, lora=task.lora
        ) from error
    except Hopeless as error:
        return cast(Exception, error.args[0])
