"""What pre-training and distillation have in common in their recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from facm_core.ema import exponent_of
from facm_core.errors import require, require_one_of
from facm_platform.config.sections import require_step_counts
from facm_platform.latents import LatentManifest, LatentStream
from facm_platform.latents.stream import WINDOW_GROUPS


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Ray Train workers, each with a shard of every weight.

    Attributes:
        max: How many work where there is room for them.
        min: With how many the run starts, or goes on when machines are lost; it takes others in
            when there is room again. None: no less than `max`. The steps are the same with any
            number.
        cpus: Ray CPUs of a worker. Below one on small machines: Ray Data, which feeds the
            workers, waits for ever when they hold every CPU.
        gpu: One GPU a worker (NCCL), else CPU (gloo).
        max_failures: How often the run restarts from its last checkpoint.
        stall_seconds: A worker that has waited so long for another, or for data, gives up, says
            which one it waited for, and the run restarts.
    """

    max: int = 2
    min: int | None = None
    cpus: float = 0.5
    gpu: bool = False
    max_failures: int = 3
    stall_seconds: float = 1800.0

    @property
    def threads(self) -> int:
        """Of a worker: the same number on every machine, so that sums are grouped alike."""
        return max(1, int(self.cpus))

    def __post_init__(self) -> None:
        require(self.max >= 1, "max", self.max, "below 1", "Use at least one worker")
        require(
            self.min is None or 1 <= self.min <= self.max,
            "min",
            self.min,
            f"not in [1, max = {self.max}]",
            "Use a number that is, or none",
        )
        require(self.cpus > 0, "cpus", self.cpus, "not positive", "Use e.g. 0.5")
        stall = self.stall_seconds
        require(stall > 0, "stall_seconds", stall, "not positive", "Use e.g. 1800")
        require(self.max_failures >= 0, "max_failures", self.max_failures, "negative", "Use 0 or 3")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation. Every length is a count of images, rounded up to whole batches.

    Attributes:
        images: Length of the run.
        global_batch_size: Images a step, over all workers.
        micro_batch_size: Rows of a worker that pass through the network at once; gradients of
            several passes are added up. None: all of its share.
        learning_rate: AdamW's, after the warm-up.
        schedule: What becomes of it then: ``constant``, or down to `final_learning_rate` at the
            end of the run, ``linear`` or half a ``cosine``.
        final_learning_rate: See `schedule`.
        fused: AdamW in one kernel.
        betas: AdamW's.
        weight_decay: AdamW's.
        warmup_images: Linear warm-up from 0.
        max_grad_norm: Gradients are scaled down to this norm.
        precision: ``float32``, or ``bfloat16`` computation with float32 weights and reduction.
        reshard_after_forward: A block's weights are gathered anew for each pass, so that no more
            than one block is whole at a time; else they stay whole until the optimizer's step,
            and a teacher's for ever: more memory, less communication.
        shard_teacher: Whether each worker holds a shard of the teacher, or all of it: more memory,
            less communication.
        replicas: Groups of workers that hold a whole student each, sharded within the group (HSDP).
            Divides the number of workers.
        offload: Shards of weights, gradients and the optimizer's state live in the machine's
            memory, and not in the GPU's.
        recompute: Blocks compute their activations again in the backward pass of the JVP.
        compile: Blocks are compiled: slower to start, faster, and less memory.
        seed: Of initial weights, data order, noise, times and label dropout.
        window_groups: Row groups of the latent set, from all over it, that are shuffled together.
            A read task holds them in memory; a set sorted by class may want more.
        ema_sigma_rels: Widths of the power-function averages that are tracked.
        export_sigma_rel: Which of them the model artefact holds.
        checkpoint_images: Distance between checkpoints.
        max_lost_images: Training goes on while a checkpoint is written and uploaded, but waits for
            it when more than so many images would be lost with the machines. `checkpoint_images`:
            it waits at once. None: it waits only before the next checkpoint.
        keep_checkpoints: How many are kept.
        keep_averages: Whether the averages of the others are kept, from which `jobs/export.py`
            makes an average of any width.
        log_images: Distance between logged metrics.
        health_images: Distance between the looks that cost some steps: whether the gradients of
            both tasks agree, and how far the anchor has drifted from its target on fixed rows.
        max_hours: The run ends, with a checkpoint and an artefact, so long after this command has
            begun to train; the same command goes on from there. None: at `images`.
        max_skipped_in_a_row: Non-finite steps are skipped, and their batches kept; this many in a
            row end the run.
        max_rollbacks: How often, instead, it goes back to its last checkpoint and on with other
            noise, times and label dropout.
    """

    images: int
    global_batch_size: int = 1024
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    schedule: str = "constant"
    final_learning_rate: float = 0.0
    fused: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_images: int = 0
    max_grad_norm: float = 1.0
    precision: str = "float32"
    reshard_after_forward: bool = True
    shard_teacher: bool = True
    replicas: int = 1
    offload: bool = False
    recompute: bool = False
    compile: bool = False
    seed: int = 0
    window_groups: int = WINDOW_GROUPS
    ema_sigma_rels: tuple[float, ...] = (0.05, 0.2)
    export_sigma_rel: float = 0.2
    checkpoint_images: int = 1_000_000
    max_lost_images: int | None = None
    keep_checkpoints: int = 2
    keep_averages: bool = True
    log_images: int = 10_000
    health_images: int = 500_000
    max_hours: float | None = None
    max_skipped_in_a_row: int = 10
    max_rollbacks: int = 0

    def __post_init__(self) -> None:
        for name in (
            "images",
            "global_batch_size",
            "checkpoint_images",
            "keep_checkpoints",
            "log_images",
            "health_images",
            "max_skipped_in_a_row",
            "window_groups",
            "replicas",
        ):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        micro = self.micro_batch_size
        require(
            micro is None or micro >= 1,
            "micro_batch_size",
            micro,
            "below 1",
            "Use a whole number from 1, or none",
        )
        lost, interval = self.max_lost_images, self.checkpoint_images
        require(
            lost is None or lost >= interval,
            "max_lost_images",
            lost,
            f"less than checkpoint_images = {interval}, the distance between checkpoints",
            "Use that number or more, or smaller distances",
        )
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "not positive", "Use a number above 0")
        for name in ("weight_decay", "warmup_images", "seed", "max_rollbacks"):
            value = getattr(self, name)
            require(value >= 0, name, value, "negative", "Use 0 or more")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "not two numbers in [0, 1)",
            "Use e.g. [0.9, 0.999]",
        )
        hours = self.max_hours
        require(
            hours is None or hours > 0, "max_hours", hours, "not positive", "Use e.g. 4, or none"
        )
        require_one_of("precision", self.precision, ("float32", "bfloat16"))
        require_one_of("schedule", self.schedule, ("constant", "linear", "cosine"))
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            "final_learning_rate",
            self.final_learning_rate,
            f"not in [0, learning_rate = {self.learning_rate}]",
            "Use 0 or a small share of it",
        )
        for sigma_rel in self.ema_sigma_rels:
            exponent_of(sigma_rel)
        require(
            self.export_sigma_rel in self.ema_sigma_rels,
            "export_sigma_rel",
            self.export_sigma_rel,
            f"not one of ema_sigma_rels = {list(self.ema_sigma_rels)}",
            "Track it, or export one that is tracked",
        )

    def micro_batches(self, workers: int) -> int:
        """In how many passes each of so many workers sees its rows of a batch."""
        share = math.ceil(self.global_batch_size / workers)
        return math.ceil(share / (self.micro_batch_size or share))

    def learning_rate_at(self, images_seen: int) -> float:
        """Of the step that ends at so many images."""
        if images_seen < self.warmup_images:
            return self.learning_rate * (images_seen / self.warmup_images)
        if self.schedule == "constant":
            return self.learning_rate
        length = max(1, self.total_images - self.warmup_images)
        left = 1 - (images_seen - self.warmup_images) / length
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * left

    @property
    def total_images(self) -> int:
        """`images`, rounded up to whole batches."""
        return math.ceil(self.images / self.global_batch_size) * self.global_batch_size

    def stream(self, uri: str, manifest: LatentManifest) -> LatentStream:
        """The order in which the rows of a set are seen."""
        return LatentStream(uri, manifest, self.seed, self.window_groups)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained in place of the network's own weights.

    Attributes:
        rank: Of each adapter.
        alpha: What an adapter adds is multiplied by alpha / rank.
        targets: Linear layers that get one: ends of their names, after a dot (``to_q``, or
            ``attn.proj``). None: attention and MLP of every block.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "below 1", "Use a whole number from 1")
        alpha = self.alpha
        require(0 < alpha < math.inf, "alpha", alpha, "not positive", "Use a number above 0")
        targets = self.targets
        problem = "no layer would be trained"
        require(targets != (), "targets", targets, problem, "Name some, or use none for the usual")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The FID of every checkpoint's average, by which the best ones are kept.

    Attributes:
        extractor: Kind of the feature extractor, as jobs/evaluate.py takes it.
        features_uri: Its address.
        samples: Number of samples; a multiple of the number of classes. Those of a set with texts
            are of the texts of its rows.
        nfe: Step counts at which it is measured; the first one decides which checkpoints are best.
        batch_size: Samples at once: memory and speed only.
        seed: Of all noise; the same for every checkpoint.
        cpus: Ray CPUs of the process that measures.
        gpu: Whether it has a GPU.
        target_fid: The run ends, as if it were at `train.images`, once a checkpoint is as good.
            None: it does not.
        reference_uri: What samples are compared with, as jobs/evaluate.py takes it; several runs
            may share the file.
    """

    extractor: str = "fitted"
    features_uri: str
    samples: int = 5000
    nfe: tuple[int, ...] = (1,)
    batch_size: int = 64
    seed: int = 0
    cpus: float = 0.25
    gpu: bool = False
    target_fid: float | None = None
    reference_uri: str | None = None

    def __post_init__(self) -> None:
        require_step_counts("nfe", self.nfe)
        batch = self.batch_size
        require(batch >= 1, "batch_size", batch, "below 1", "Use a whole number from 1")
        require(self.seed >= 0, "seed", self.seed, "negative", "Use 0 or more")
        require(self.cpus > 0, "cpus", self.cpus, "not positive", "Use e.g. 0.25")
        target = self.target_fid
        require(
            target is None or target > 0, "target_fid", target, "not positive", "Use more, or none"
        )

    @property
    def metric(self) -> str:
        """The name of the distance that decides."""
        return fid_name(self.nfe[0])


def fid_name(steps: int) -> str:
    """Of the metric: the FID of samples in so many steps."""
    return f"fid_nfe{steps}"


def error_name(steps: int) -> str:
    """Of the metric that is its standard error."""
    return f"{fid_name(steps)}_error"
