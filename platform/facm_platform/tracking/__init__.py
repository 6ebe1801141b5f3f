"""MLflow: where runs are kept, one run's outputs, and metrics that survive a server outage."""

from facm_platform.tracking.run import Run, open_run
from facm_platform.tracking.sender import MetricSender
from facm_platform.tracking.store import Store, TrackingConfig, check_store, connect_store

__all__ = [
    "MetricSender",
    "Run",
    "Store",
    "TrackingConfig",
    "check_store",
    "connect_store",
    "open_run",
]
