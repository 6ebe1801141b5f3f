"""What Prometheus learns of a run: gauges ``ray_facm_…``, each by ``run`` and ``run_id``."""

from __future__ import annotations

import threading
import time
from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.util.metrics import Gauge

from facm_platform.training.task import TrainingTask

GAUGES = {
    "begun_seconds": "Unix time at which the workers began; anew after each restart",
    "saved_seconds": "Unix time at which the last checkpoint was committed",
    "images_seen": "Images trained on, as of the last step",
    "total_images": "Images at the end of the run",
    "checkpoint_images": "Images between checkpoints",
    "unmeasured_checkpoints": "Checkpoints whose FID is not known yet",
}
"""Beside the metrics of a log window, which go by their own names."""

# Ray's agent forgets a gauge that has not been set for 20 s, so that those of the dead go.
_AGAIN_SECONDS = 5.0


class RunGauges:
    """Those of one run, for as long as this process lives or `close` is called.

    Args:
        task: The run.
    """

    def __init__(self, task: TrainingTask) -> None:
        name = task.folder_uri.rsplit("/", 1)[-1]
        self._tags = {"run": name, "run_id": task.run_id or name}
        self._values: dict[str, float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._tell, name="gauges", daemon=True).start()

    def set(self, **values: float) -> None:
        """Let them have these values; costs no more than a dictionary."""
        self._values |= values

    def close(self) -> None:
        """Let them go."""
        self._closed.set()

    def _tell(self) -> None:
        while not self._closed.wait(_AGAIN_SECONDS):
            for name, value in self._values.copy().items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(
                        "facm_" + name.replace("/", "_"),
                        description=GAUGES.get(name, name),
                        tag_keys=tuple(self._tags),
                    )
                self._gauges[name].set(value, self._tags)


class CheckpointClock(UserCallback):
    """Tells, from Ray Train's controller, when a checkpoint was committed by all workers.

    Args:
        task: The run.
    """

    def __init__(self, task: TrainingTask) -> None:
        self._task = task
        self._gauges: RunGauges | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Of all workers."""
        if checkpoint is not None:
            # Not before: the controller is another process than the one that made this.
            self._gauges = self._gauges or RunGauges(self._task)
            self._gauges.set(saved_seconds=time.time())
