"""Everything a worker needs to know, as plain picklable data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

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
from facm_platform.training.config import LoraConfig, TrainConfig, ValidationConfig

SAME = "same"
STUDENTS = (SAME, "high_noise", "low_noise")
"""A network like the teacher, or like one of its experts."""

Method: TypeAlias = FACMConfig | MeanFlowConfig | SCMConfig | FlowMatchingConfig


@dataclass(frozen=True)
class Stage:
    """What is in force from some count of images on.

    Attributes:
        from_images: That count.
        objective: The loss.
        train: Optimisation.
    """

    from_images: int
    objective: Method
    train: TrainConfig


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
        stages: What takes the place of both on the way, in order.
        teacher_uri: Artefact of the frozen teacher, whose weights the student starts with; None
            when training from scratch.
        student: Which of the teacher's weights these are, one of `STUDENTS`.
        lora: Adapters, which are trained in place of these weights; None where the weights are.
        artifact: Description of the model that will come out, its architecture included.
        tracking_uri: MLflow store.
        run_id: MLflow run that receives the metrics; None for none.
        validation: How checkpoints are measured; None for not at all.
        start_uri: Checkpoint of another run, which this one begins with; None to begin anew.
    """

    job: str
    folder_uri: str
    stream: LatentStream
    objective: Method
    train: TrainConfig
    stages: tuple[Stage, ...] = ()
    teacher_uri: str | None
    student: str = SAME
    lora: LoraConfig | None = None
    artifact: ArtifactConfig
    tracking_uri: str
    run_id: str | None
    validation: ValidationConfig | None = None
    start_uri: str | None = None

    @property
    def artifact_uri(self) -> str:
        """Where the model artefact will be."""
        return join(self.folder_uri, "artifact")

    @property
    def skipped_uri(self) -> str:
        """Where the batches of skipped steps are kept."""
        return join(self.folder_uri, "skipped")

    @property
    def teachers(self) -> int:
        """Frozen networks: none in pre-training, two where the teacher is a pair of experts."""
        if self.teacher_uri is None:
            return 0
        return self.artifact.architecture.networks if self.student == SAME else 2

    def stage_at(self, images_seen: int) -> Stage:
        """What is in force after so many images."""
        begun = [stage for stage in self.stages if stage.from_images <= images_seen]
        return begun[-1] if begun else Stage(0, self.objective, self.train)

    def build_objective(self, method: Method | None = None) -> Objective:
        """The loss described by `method`; by `objective` where that is None."""
        recompute = self.train.recompute
        match method or self.objective:
            case FACMConfig() as config:
                return FACM(config, recompute=recompute)
            case MeanFlowConfig() as config:
                return MeanFlow(config, recompute=recompute)
            case SCMConfig() as config:
                return SCM(config, recompute=recompute)
            case FlowMatchingConfig() as config:
                return FlowMatching(config)
