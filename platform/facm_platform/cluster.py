"""The Ray cluster a job runs on, and the code it ships there."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private.utils import read_ray_address
from ray.autoscaler.v2.utils import is_autoscaler_v2

import facm_core
import facm_platform
from facm_core.errors import InvalidInputError


@contextmanager
def connected() -> Iterator[None]:
    """Join the cluster of this machine or of ``RAY_ADDRESS``; without one, start a local one.

    The two packages travel to the workers from here, so nothing of this repository needs to be
    installed on a cluster. Leaves at the end, so that no worker prints after the job's last line;
    where Ray was connected before, it stays.
    """
    if ray.is_initialized():
        yield
        return
    # Doubled lines otherwise: Train prints what Ray forwards to the driver anyway.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    packages = [str(Path(package.__path__[0])) for package in (facm_core, facm_platform)]
    ray.init(
        address=cluster_address(),
        runtime_env={
            "py_modules": packages,
            # Otherwise every execution of a data set says that it is finished.
            "env_vars": {"RAY_DATA_LOG_LEVEL": "WARNING"},
        },
        logging_level=logging.WARNING,
    )
    try:
        yield
    finally:
        ray.shutdown()


def cluster_address() -> str | None:
    """What to tell Ray: ``local`` where it would wait minutes for a cluster that is gone.

    ``ray start`` leaves its address in a file, which stays when the cluster is killed.
    """
    recorded = None if "RAY_ADDRESS" in os.environ else read_ray_address()
    if not recorded:
        return None
    host, _, port = recorded.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(5)
        return None if probe.connect_ex((host, int(port))) == 0 else "local"


def grows() -> bool:
    """Whether the connected cluster gets more machines when they are needed."""
    return bool(is_autoscaler_v2(fetch_from_server=True))


def require_cpus(field: str, cpus: float, spare: float) -> None:
    """Make sure that the connected cluster has `cpus` for workers and `spare` for their data.

    One that grows as needed has no workers before they are asked for, and Ray does not tell how
    far it would grow: it is given every run.

    Raises:
        InvalidInputError: with what there is; a run that does not fit would wait for ever.
    """
    if grows():
        return
    total = float(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
    if cpus + spare > total:
        raise InvalidInputError(
            field,
            cpus,
            f"with {spare} for reading data this is more than the cluster's {total} CPUs",
            "Use fewer workers or less workers.cpus, or a larger cluster",
        )
