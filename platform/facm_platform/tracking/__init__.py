"""MLflow: where runs are kept, one run's outputs, and metrics that survive a server outage."""

from facm_platform.tracking.run import Run, check_run_name, find_run, latest_metric, open_run
from facm_platform.tracking.sender import MetricSender
from facm_platform.tracking.store import (
    Store,
    TrackingConfig,
    check_store,
    connect_store,
    embedded_root,
    new_client,
)

__all__ = [
    "MetricSender",
    "Run",
    "Store",
    "TrackingConfig",
    "check_run_name",
    "check_store",
    "connect_store",
    "embedded_root",
    "find_run",
    "latest_metric",
    "new_client",
    "open_run",
]
