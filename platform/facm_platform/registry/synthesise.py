"""Prompts -> a latent set that a teacher draws: data for a distillation where there are none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from facm_core.errors import require
from facm_core.guidance import GuidanceConfig
from facm_core.models import Network
from facm_core.samplers import sample_euler, sample_noise
from facm_platform import storage
from facm_platform.config.sections import RunConfig, TeacherConfig
from facm_platform.latents.build import BuildersConfig, BuildPlan, Piece, SetBuild
from facm_platform.latents.captions import Embedder
from facm_platform.latents.manifest import Quarantined
from facm_platform.latents.null_text import NullText
from facm_platform.latents.tables import KEY, LATENT, RowFormat
from facm_platform.latents.text_encoder import find_text_encoder, open_text_encoder
from facm_platform.prompts import read_prompts
from facm_platform.registry.artifact import ArtifactInfo, load_artifact, read_artifact
from facm_platform.tracking import check_run_name, check_store, embedded_root

JOB = "synthesise"
# To be raised when equal configurations give other latents or another layout than before.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SynthesiseConfig:
    """What `jobs/synthesise.py` takes.

    Attributes:
        run: Name and tracking.
        prompts_uri: UTF-8 file, local or ``s3://``, with a prompt in each line.
        per_prompt: Latents of each prompt.
        teacher: Who draws them.
        steps: Of Euler's method for each, with the teacher's time shift.
        sampling: Guidance; None: as the teacher recommends.
        seed: Of the noise.
        output_uri: Folder or ``s3://`` address of the latent set.
        part_rows: Latents of a part, which is what an interrupted job loses.
        batch_size: Latents drawn at once; on a GPU the networks compute in bfloat16.
        workers: Who works.
        overwrite: Replace another set that lies at `output_uri`.
    """

    run: RunConfig
    prompts_uri: str
    per_prompt: int = 1
    teacher: TeacherConfig
    steps: int = 50
    sampling: GuidanceConfig | None = None
    seed: int = 0
    output_uri: str
    part_rows: int = 256
    batch_size: int = 16
    workers: BuildersConfig = field(default_factory=BuildersConfig)
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("per_prompt", "steps", "part_rows", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        require(self.seed >= 0, "seed", self.seed, "negative", "Give 0 or more")


def prepare(config: SynthesiseConfig) -> BuildPlan:
    """Check everything that can be checked without a cluster.

    Raises:
        InvalidInputError: no prompts, blank or repeated ones; no teacher of images from texts, or
            one whose text encoder is not where it says or is another one by now; or an output that
            is taken (see `SetBuild.finished`).
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    output_uri = storage.absolute(config.output_uri, "output_uri")
    prompts = read_prompts(config.prompts_uri)
    teacher = read_artifact(config.teacher.uri)
    _check_teacher(config, teacher)
    of_teacher = teacher.config
    channels, height, width = of_teacher.latent_shape
    format = RowFormat(
        latent_shape=(channels, height, width),
        latent_dtype="float32",
        text_shape=of_teacher.architecture.text_shape,
    )
    guidance = config.sampling or of_teacher.guidance
    determining = {
        "synthesiser": _VERSION,
        "prompts": prompts,
        "teacher": teacher.sha256,
        "shift": of_teacher.shift,
        "text_encoder": of_teacher.text_encoder_sha256,
        "guidance": dataclasses.asdict(guidance),
        "precision": "bfloat16" if config.workers.gpu else "float32",
        "format": dataclasses.asdict(format),
        **{
            name: getattr(config, name)
            for name in ("per_prompt", "steps", "seed", "part_rows", "batch_size")
        },
    }
    build = SetBuild(
        uri=output_uri,
        format=format,
        sha256=hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest(),
        pieces=partial(_pieces, prompts, config.per_prompt, config.part_rows),
        reader=partial(Synthesiser, config, teacher, guidance, format),
        workers=config.workers,
        manifest={
            "autoencoder_id": of_teacher.autoencoder_id,
            "autoencoder_sha256": of_teacher.autoencoder_sha256,
            "created_by": f"facm-platform {JOB} {_VERSION}, pyarrow {pa.__version__}",
        },
        normalisation=(of_teacher.normalisation_mean, of_teacher.normalisation_std),
        max_quarantined=0.0,
        overwrite=config.overwrite,
    )
    return BuildPlan(
        job=JOB,
        config=config,
        run=config.run,
        build=build,
        what=f"{config.per_prompt} x {len(prompts):,} prompts by {teacher.uri}",
        made=build.finished(),
        made_from={
            "teacher_sha256": teacher.sha256,
            "text_encoder_sha256": of_teacher.text_encoder_sha256,
        },
    )


class Synthesiser:
    """Draws latents; one for each worker process.

    Args:
        config: The job's.
        teacher: As the job saw it.
        guidance: With which it is asked.
        format: Of the set.
    """

    def __init__(
        self,
        config: SynthesiseConfig,
        teacher: ArtifactInfo,
        guidance: GuidanceConfig,
        format: RowFormat,
    ) -> None:
        self._config, self._guidance, self._format = config, guidance, format
        self._device = torch.device("cuda" if config.workers.gpu else "cpu")
        dtype = torch.bfloat16 if config.workers.gpu else torch.float32
        artifact = load_artifact(teacher.uri)
        changed = "its weights are others than when the job began"
        require(
            artifact.sha256 == teacher.sha256, "teacher.uri", teacher.uri, changed, "Restore them"
        )
        self._of_teacher = artifact.config
        self._model = narrowed(artifact.model, dtype).to(self._device)
        encoder = open_text_encoder(
            teacher.config.text_encoder_id,
            format.text_shape[0],
            teacher.config.text_encoder_sha256,
            "teacher.uri",
        )
        self._texts = Embedder(encoder.to(self._device, dtype))
        torch.set_num_threads(config.workers.cpus)

    def null_text(self) -> NullText:
        """The null prompt."""
        return self._texts.null

    def rows(self, piece: Piece) -> Iterator[pa.Table | Quarantined]:
        """The latents of the rows of `piece`: of each prompt the first, the second, …"""
        images, batch = self._config.per_prompt, self._config.batch_size
        for start in range(piece["start"], piece["stop"], batch):
            rows = range(start, min(start + batch, piece["stop"]))
            keys = [f"prompt-{row // images:06d}/{row % images}" for row in rows]
            prompts = [piece["prompts"][row // images - piece["start"] // images] for row in rows]
            texts = self._texts.columns(prompts)
            yield self._format.table({KEY: keys, LATENT: self._latents(keys, texts), **texts})

    @torch.inference_mode()
    def _latents(
        self, keys: list[str], texts: dict[str, NDArray[np.generic]]
    ) -> NDArray[np.float32]:
        """Drawn from what is stored of the prompts, which is what a student will read.

        The state is float32 whatever the network computes in, so that roundings do not add up.
        """
        config = self._of_teacher
        seeds = [_seed(self._config.seed, key) for key in keys]
        x = sample_euler(
            self._model,
            sample_noise(config.latent_shape, seeds).to(self._device),
            {name: torch.from_numpy(value).to(self._device) for name, value in texts.items()},
            steps=self._config.steps,
            guidance=self._guidance,
            shift=config.shift,
        )
        statistics = (config.normalisation_mean, config.normalisation_std)
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in statistics)
        latents: NDArray[np.float32] = (x * std + mean).cpu().numpy()
        return latents


def narrowed(model: Network, dtype: torch.dtype) -> Network:
    """The same network with weights in `dtype`, but for those that diffusers keeps in float32.

    Buffers stay as they are: a rotation that is rounded to bfloat16 is another place.
    """
    lists = (getattr(module, "_keep_in_fp32_modules", None) for module in model.modules())
    kept = {part for parts in lists for part in parts or ()}
    for name, parameter in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def _check_teacher(config: SynthesiseConfig, teacher: ArtifactInfo) -> None:
    of_teacher, uri = teacher.config, config.teacher.uri
    shape = of_teacher.architecture.text_shape
    for holds, problem, remedy in (
        (of_teacher.role == "teacher", f"it is a {of_teacher.role}", "Give a teacher's artefact"),
        (len(shape) == 2, "it reads labels, not texts", "Use a teacher of jobs/import_wan.py"),
        (len(of_teacher.latent_shape) == 3, "it draws videos", "Import it with frames=1"),
        (
            bool(of_teacher.text_encoder_id),
            "it does not say by what its prompts are embedded",
            "Import it again with jobs/import_wan.py",
        ),
    ):
        require(holds, "teacher.uri", uri, problem, remedy)
    sha256 = of_teacher.text_encoder_sha256
    found = find_text_encoder(of_teacher.text_encoder_id, shape[0], sha256, "teacher.uri")
    require(
        found.text_shape == shape,
        "teacher.uri",
        uri,
        f"it reads texts {shape}, its text encoder makes {found.text_shape}",
        "Import it again with jobs/import_wan.py",
    )


def _pieces(prompts: Sequence[str], per_prompt: int, part_rows: int) -> Iterator[Piece]:
    """Stretches of rows, each with the prompts of its rows."""
    count = len(prompts) * per_prompt
    for start in range(0, count, part_rows):
        stop = min(start + part_rows, count)
        chosen = prompts[start // per_prompt : -(-stop // per_prompt)]
        yield {"start": start, "stop": stop, "prompts": chosen}


def _seed(seed: int, key: str) -> int:
    """Of the noise of one row, whatever else is drawn with it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big")
