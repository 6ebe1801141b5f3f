"""Everything a worker needs to know, as plain picklable data."""

from __future__ import annotations

from dataclasses import dataclass

from facm_core.objectives import (
    FACM,
    SCM,
    FACMConfig,
    FlowMatching,
    FlowMatchingConfig,
    MeanFlow,
    MeanFlowConfig,
    Objective,
    SCMConfig,
)
from facm_platform.latents import LatentStream
from facm_platform.registry import ArtifactConfig
from facm_platform.storage import join
from facm_platform.training.config import TrainConfig, ValidationConfig


class Hopeless(Exception):
    """To try again would end the same way, as every rank knows; the argument is the reason."""


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """One training run.

    Attributes:
        job: ``pretrain`` or ``distill``, for messages.
        folder_uri: The run's own folder.
        stream: Order of the data, one lane a worker.
        objective: The loss.
        train: Optimisation.
        teacher_uri: Artefact of the frozen teacher, which is also the student's start; None when
            training from scratch.
        artifact: Description of the model that will come out, its architecture included.
        tracking_uri: MLflow store.
        run_id: MLflow run that receives the metrics; None for none.
        validation: How checkpoints are measured; None for not at all.
    """

    job: str
    folder_uri: str
    stream: LatentStream
    objective: FACMConfig | MeanFlowConfig | SCMConfig | FlowMatchingConfig
    train: TrainConfig
    teacher_uri: str | None
    artifact: ArtifactConfig
    tracking_uri: str
    run_id: str | None
    validation: ValidationConfig | None = None

    @property
    def artifact_uri(self) -> str:
        """Where the model artefact will be."""
        return join(self.folder_uri, "artifact")

    @property
    def skipped_uri(self) -> str:
        """Where the batches of skipped steps are kept."""
        return join(self.folder_uri, "skipped")

    def build_objective(self) -> Objective:
        """The loss described."""
        recompute = self.train.recompute
        match self.objective:
            case FACMConfig():
                return FACM(self.objective, recompute=recompute)
            case MeanFlowConfig():
                return MeanFlow(self.objective, recompute=recompute)
            case SCMConfig():
                return SCM(self.objective, recompute=recompute)
            case FlowMatchingConfig():
                return FlowMatching(self.objective)
