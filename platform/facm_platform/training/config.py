"""What pre-training and distillation have in common in their recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from facm_core.ema import exponent_of
from facm_core.errors import require, require_one_of
from facm_platform.latents import LatentManifest, LatentStream
from facm_platform.latents.stream import WINDOW_GROUPS


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Ray Train workers.

    Attributes:
        count: Number of workers; each holds a shard of every weight. A run may go on with
            another number.
        cpus: Ray CPUs of a worker. Below one on small machines: Ray Data, which feeds the
            workers, waits for ever when they hold every CPU.
        gpu: One GPU a worker (NCCL), else CPU (gloo).
        max_failures: How often the run restarts from its last checkpoint.
    """

    count: int = 2
    cpus: float = 0.5
    gpu: bool = False
    max_failures: int = 3

    def __post_init__(self) -> None:
        require(self.count >= 1, "count", self.count, "below 1", "Use at least one worker")
        require(self.cpus > 0, "cpus", self.cpus, "not positive", "Use e.g. 0.5")
        require(self.max_failures >= 0, "max_failures", self.max_failures, "negative", "Use 0 or 3")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. Every length is a count of images, rounded up to whole batches.

    Attributes:
        images: Length of the run.
        global_batch_size: Images a step, over all workers.
        learning_rate: AdamW's, constant after the warm-up.
        betas: AdamW's.
        weight_decay: AdamW's.
        warmup_images: Linear warm-up from 0.
        max_grad_norm: Gradients are scaled down to this norm.
        precision: ``float32``, or ``bfloat16`` computation with float32 weights and reduction.
        reshard_after_forward: A block's weights are gathered anew for each pass, so that no more
            than one block is whole at a time; else they stay whole until the optimizer's step,
            and a teacher's for ever: more memory, less communication.
        recompute: Blocks compute their activations again in the backward pass of the JVP.
        seed: Of initial weights, data order, noise, times and label dropout.
        window_groups: Row groups of the latent set, from all over it, that are shuffled together.
            A read task holds them in memory; a set sorted by class may want more.
        ema_sigma_rels: Widths of the power-function averages that are tracked.
        export_sigma_rel: Which of them the model artefact holds.
        checkpoint_images: Distance between checkpoints.
        keep_checkpoints: How many are kept.
        log_images: Distance between logged metrics.
        max_skipped_in_a_row: Non-finite steps are skipped; this many in a row end the run.
    """

    images: int
    global_batch_size: int = 1024
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_images: int = 0
    max_grad_norm: float = 1.0
    precision: str = "float32"
    reshard_after_forward: bool = True
    recompute: bool = False
    seed: int = 0
    window_groups: int = WINDOW_GROUPS
    ema_sigma_rels: tuple[float, ...] = (0.05, 0.2)
    export_sigma_rel: float = 0.2
    checkpoint_images: int = 1_000_000
    keep_checkpoints: int = 2
    log_images: int = 10_000
    max_skipped_in_a_row: int = 10

    def __post_init__(self) -> None:
        for name in (
            "images",
            "global_batch_size",
            "checkpoint_images",
            "keep_checkpoints",
            "log_images",
            "max_skipped_in_a_row",
            "window_groups",
        ):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "not positive", "Use a number above 0")
        for name in ("weight_decay", "warmup_images", "seed"):
            value = getattr(self, name)
            require(value >= 0, name, value, "negative", "Use 0 or more")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "not two numbers in [0, 1)",
            "Use e.g. [0.9, 0.999]",
        )
        require_one_of("precision", self.precision, ("float32", "bfloat16"))
        for sigma_rel in self.ema_sigma_rels:
            exponent_of(sigma_rel)
        require(
            self.export_sigma_rel in self.ema_sigma_rels,
            "export_sigma_rel",
            self.export_sigma_rel,
            f"not one of ema_sigma_rels = {list(self.ema_sigma_rels)}",
            "Track it, or export one that is tracked",
        )

    @property
    def total_images(self) -> int:
        """`images`, rounded up to whole batches."""
        return math.ceil(self.images / self.global_batch_size) * self.global_batch_size

    def stream(self, uri: str, manifest: LatentManifest) -> LatentStream:
        """The order in which the rows of a set are seen."""
        return LatentStream(uri, manifest, self.seed, self.window_groups)
