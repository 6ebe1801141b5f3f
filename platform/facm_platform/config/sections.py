"""Sections that the recipes of several jobs share."""

from __future__ import annotations

from dataclasses import dataclass, field

from facm_core.errors import require
from facm_platform.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's name and where it is kept.

    Attributes:
        name: The same name and config again resumes the run.
        storage_uri: Folder or ``s3://`` prefix, under which the run has a folder of its name.
        tracking: MLflow.
    """

    name: str
    storage_uri: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The latent set.

    Attributes:
        uri: Folder or ``s3://`` prefix that jobs/encode.py wrote.
    """

    uri: str


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher.

    Attributes:
        uri: Folder or ``s3://`` prefix of its model artefact.
    """

    uri: str


def require_step_counts(field: str, steps: tuple[int, ...]) -> None:
    """Raise `InvalidInputError` unless these are numbers of steps to sample in."""
    fits = bool(steps) and min(steps) >= 1 and len(set(steps)) == len(steps)
    require(fits, field, steps, "not different step counts from 1", "Use e.g. [1,2,4]")
