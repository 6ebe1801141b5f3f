"""Flow-matching pre-training of a teacher on a latent set."""

from __future__ import annotations

from dataclasses import dataclass, field

from facm_core.errors import InvalidInputError, require
from facm_core.guidance import GuidanceConfig
from facm_core.models import Architecture, LightningDiTConfig, WanConfig
from facm_core.objectives import FlowMatchingConfig
from facm_platform.config import JobResult, config_hash
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.latents import LatentManifest
from facm_platform.latents.null_text import NullText
from facm_platform.registry import ArtifactConfig
from facm_platform.training.config import TrainConfig, WorkersConfig
from facm_platform.training.run import (
    check_batch,
    check_run,
    cost_estimate,
    execute,
    open_data,
)
from facm_platform.training.task import TrainingTask


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Size of the teacher; the latent set decides about the rest of `LightningDiTConfig`.

    Attributes:
        patch_size: Side of a patch, in latent cells.
        hidden_size: Token width.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of the SwiGLU, before its ⅔.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0

    def on(self, manifest: LatentManifest) -> LightningDiTConfig:
        """The architecture for the latents of a set."""
        channels, height, _ = manifest.latent_shape
        return LightningDiTConfig(
            input_size=height,
            in_channels=channels,
            num_classes=manifest.num_classes,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class WanNetworkConfig:
    """Size of a teacher that reads texts; the latent set decides about the rest of `WanConfig`.

    Attributes:
        patch_size: Side of a patch, in latent cells.
        num_layers: Number of blocks.
        num_attention_heads: Attention heads.
        attention_head_dim: Channels of each, an even number from 6.
        ffn_dim: Width of a block's MLP.
        freq_dim: Width of the sinusoidal time features.
        fastest: Sinusoids of the time turn by at most so many radians per unit of t. Published
            networks have 1,000 (None), which students by FACM do not bear.
    """

    patch_size: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    freq_dim: int = 256
    fastest: float | None = 20.0

    def on(self, manifest: LatentManifest) -> WanConfig:
        """The architecture for the latents and the texts of a set."""
        channels, height, width = manifest.latent_shape
        tokens, features = manifest.text_shape
        return WanConfig(
            height=height,
            width=width,
            in_channels=channels,
            text_tokens=tokens,
            text_dim=features,
            patch_size=(1, self.patch_size, self.patch_size),
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=self.attention_head_dim,
            ffn_dim=self.ffn_dim,
            freq_dim=self.freq_dim,
            fastest=self.fastest,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Recipe of jobs/pretrain.py.

    Attributes:
        run: Name and place of the run.
        data: Latent set.
        network: Size of a LightningDiT, for a set with labels; or
        wan: size of a Wan, for a set with texts.
        objective: Flow matching.
        sampling: Guidance with which the teacher is meant to be sampled.
        train: Optimisation.
        workers: Ray Train workers.
    """

    run: RunConfig
    data: DataConfig
    network: NetworkConfig | None = None
    wan: WanNetworkConfig | None = None
    objective: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    sampling: GuidanceConfig = field(default_factory=GuidanceConfig)
    train: TrainConfig
    workers: WorkersConfig = field(default_factory=WorkersConfig)


@dataclass(frozen=True)
class PretrainPlan:
    """A validated pre-training."""

    config: PretrainConfig
    folder_uri: str
    data_uri: str
    manifest: LatentManifest
    architecture: Architecture
    null: NullText | None

    def describe(self) -> str:
        """What would be trained, on what."""
        config, train = self.config, self.config.train
        return (
            f"pretrain {config.run.name}: {train.total_images:,} images in batches of "
            f"{train.global_batch_size} on {config.workers.max} workers, from {self.data_uri} "
            f"({self.manifest.rows:,} rows) to {self.folder_uri}\n"
            + cost_estimate(self.architecture, train, config.workers, teachers=0)
        )

    def execute(self) -> JobResult:
        """Train on the cluster."""
        config = self.config
        return execute(
            config.run,
            config,
            config.workers,
            job="pretrain",
            lineage=lineage(self.manifest),
            make_task=self.task,
        )

    def task(self, tracking_uri: str, run_id: str) -> TrainingTask:
        """The worker's view of it."""
        config, manifest, null = self.config, self.manifest, self.null
        artifact = ArtifactConfig(
            role="teacher",
            architecture=self.architecture,
            objective="flow_matching",
            conditioning="expanded" if config.objective.expanded else "plain",
            guidance_scale=config.sampling.scale,
            guidance_low=config.sampling.low,
            guidance_high=config.sampling.high,
            recommended_nfe=(50,),
            normalisation_mean=manifest.mean,
            normalisation_std=manifest.std,
            autoencoder_id=manifest.autoencoder_id,
            autoencoder_sha256=manifest.autoencoder_sha256,
            text_encoder_id=null.encoder_id if null else "",
            text_encoder_sha256=null.encoder_sha256 if null else "",
            latent_manifest_sha256=manifest.sha256,
            teacher_sha256=None,
            images_seen=config.train.total_images,
            ema_sigma_rel=config.train.export_sigma_rel,
            config_hash=config_hash(config),
        )
        return TrainingTask(
            job="pretrain",
            folder_uri=self.folder_uri,
            stream=config.train.stream(self.data_uri, manifest),
            objective=config.objective,
            train=config.train,
            teacher_uri=None,
            artifact=artifact,
            tracking_uri=tracking_uri,
            run_id=run_id,
        )


def prepare(config: PretrainConfig) -> PretrainPlan:
    """Validate a pre-training without touching a cluster.

    Raises:
        InvalidInputError: see `check_run`, `check_batch`, `open_data`, `NullText.load`; or a
            network that does not fit the latents, or reads something else.
    """
    check_batch(config.train, config.workers)
    data_uri, manifest = open_data(config.data)
    architecture = _architecture(config, manifest)
    null = NullText.load(data_uri, manifest) if manifest.text_shape else None
    folder_uri = check_run(config.run, config, lineage(manifest))
    return PretrainPlan(config, folder_uri, data_uri, manifest, architecture, null)


def _architecture(config: PretrainConfig, manifest: LatentManifest) -> Architecture:
    """The network that is asked for, which must be one for this set."""
    given, texts = config.wan or config.network, bool(manifest.text_shape)
    wanted, read = ("wan", "texts") if texts else ("network", "labels")
    other = "network" if texts else "wan"
    for name, holds, problem in (
        (wanted, getattr(config, wanted) is not None, f"the rows of data.uri have {read}"),
        (other, getattr(config, other) is None, f"it does not read {read}, which data.uri has"),
    ):
        value = getattr(config, name)
        require(holds, name, value, problem, f"Give {wanted}, the size of a network, and no other")
    _, height, width = manifest.latent_shape
    square = f"latents {manifest.latent_shape} are not square"
    remedy = "Use another latent set"
    require(texts or height == width, "data.uri", config.data.uri, square, remedy)
    assert given is not None
    try:
        return given.on(manifest)
    except InvalidInputError as error:
        raise error.inside(wanted) from None


def lineage(manifest: LatentManifest) -> dict[str, str]:
    """What a teacher is made from."""
    return {"manifest_sha256": manifest.sha256}
