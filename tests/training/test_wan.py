"""Text-conditioned Wan in the training loop: one network or two, one process or sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from facm_core.autoencoders import load_autoencoder
from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.memory import MemoryConfig, plan, preset_of
from facm_core.models import WanConfig
from facm_core.objectives import FACMConfig, FlowMatchingConfig, MeanFlowConfig, SCMConfig
from facm_platform.config.sections import DataConfig, RunConfig, TeacherConfig
from facm_platform.latents import LatentManifest
from facm_platform.latents.null_text import NullText
from facm_platform.registry import load_artifact
from facm_platform.registry.import_wan import ImportWanConfig
from facm_platform.registry.import_wan import prepare as prepare_import
from facm_platform.tracking import Store
from facm_platform.training import distill, pretrain
from facm_platform.training.config import WorkersConfig
from facm_platform.training.context import LocalContext
from facm_platform.training.distill import DistillConfig, DistillPlan
from facm_platform.training.export import export
from facm_platform.training.launch import launch
from facm_platform.training.loop import train
from facm_platform.training.memory import worker_memory
from facm_platform.training.pretrain import (
    NetworkConfig,
    PretrainConfig,
    PretrainPlan,
    WanNetworkConfig,
)
from facm_platform.training.task import TrainingTask
from tests.small import ARCHITECTURE, artifact_config, write_model
from tests.tiny_wan import SIDE, TEXT, write_pipeline, write_texts
from tests.training.conftest import TRAIN, plain_training, weights

Distill = Callable[..., DistillPlan]


@pytest.fixture
def distilled(tmp_path: Path, store: Store) -> Distill:
    """``distilled(field=value)`` -> the plan of a distillation of a pair of experts."""
    make_teacher(tmp_path, boundary=0.5)

    def make(**changes: Any) -> DistillPlan:
        values: dict[str, Any] = {
            "run": RunConfig(name="wan", storage_uri=str(tmp_path / "runs")),
            "data": DataConfig(uri=str(tmp_path / "set")),
            "teacher": TeacherConfig(uri=str(tmp_path / "teacher")),
            "train": TRAIN,
        }
        return distill.prepare(DistillConfig(**values | changes))

    return make


def make_teacher(folder: Path, boundary: float | None, name: str = "teacher") -> TeacherConfig:
    """Of the texts in ``set``, which are written if need be."""
    pipeline = folder / f"{name}-pipeline"
    write_pipeline(pipeline, boundary=boundary)
    if not (folder / "set").exists():
        write_texts(folder / "set", by=load_autoencoder("vae", pipeline / "vae"))
    config = ImportWanConfig(
        run=RunConfig(name=name, storage_uri=str(folder / "runs")),
        source_uri=str(pipeline),
        height=SIDE,
        width=SIDE,
        tokens=TEXT[0],
        output_uri=str(folder / name),
    )
    prepare_import(config).execute()
    return TeacherConfig(uri=str(folder / name))


def task_of(plan: DistillPlan) -> TrainingTask:
    return replace(plan.task("", ""), run_id=None)


def assert_plain(task: TrainingTask) -> None:
    got = weights(task)
    for name, expected in plain_training(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_with_shards_of_a_pair_equal_one_plain_process(distilled: Distill) -> None:
    """By how far each tensor has come: Adam makes a step of any gradient, also of one that is
    nothing but the rounding of another order of summation."""
    task = task_of(distilled())
    launch(task, WorkersConfig(max=2))
    assert task.teacher_uri is not None
    start, got = load_artifact(task.teacher_uri).model.state_dict(), weights(task)
    for name, expected in plain_training(task).items():
        moved = (expected - start[name]).norm()
        assert (got[name] - expected).norm() <= 1e-3 * moved, name


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("student", ["high_noise", "low_noise"])
def test_one_network_starts_as_one_expert(distilled: Distill, tmp_path: Path, student: str) -> None:
    task = task_of(distilled(student=student))
    assert task.artifact.architecture.boundary is None
    train(task, LocalContext(Path(task.folder_uri)))
    assert_plain(task)
    assert weights(task)["null_text_embedding"].any()
    (checkpoint,) = (Path(task.folder_uri)).glob(f"checkpoint_*{TRAIN.images}")
    export(str(checkpoint), str(tmp_path / "exported"))
    again, first = (load_artifact(uri) for uri in (str(tmp_path / "exported"), task.artifact_uri))
    assert again.sha256 == first.sha256
    assert again.config == first.config


def test_the_memory_of_two_networks(distilled: Distill) -> None:
    both, one = (distilled(student=student) for student in ("same", "low_noise"))
    size = sum(p.numel() for p in load_artifact(both.teacher.uri).model.parameters())
    for prepared, share in ((both, 1.0), (one, 0.5)):
        assert task_of(prepared).teachers == 2
        memory = plan(preset_of(prepared.architecture), MemoryConfig(gpus=2, teachers=2))
        assert memory.teachers == 4 * size // 2
        assert memory.parameters == memory.gradients == share * memory.teachers
        assert memory.optimizer == memory.averages == 2 * memory.parameters
        assert f"teachers {memory.teachers / 2**20:,.0f}, " in prepared.describe()
    whole = worker_memory(both.architecture, replace(TRAIN, shard_teacher=False), 2, teachers=2)
    assert whole.teachers == 4 * size


def test_what_makes_no_sense(distilled: Distill, tmp_path: Path) -> None:
    one = make_teacher(tmp_path, boundary=None, name="one")
    assert distilled(teacher=one).architecture.networks == 1
    with pytest.raises(InvalidInputError, match=r"student = 'low_noise': the teacher is one net"):
        distilled(teacher=one, student="low_noise")
    with pytest.raises(InvalidInputError, match=r"reads one time, and objective .* needs two"):
        distilled(objective=FACMConfig(conditioning="auxiliary"))
    with pytest.raises(InvalidInputError, match=r"reads one time, and mean_flow .* or scm"):
        distilled(teacher=one, mean_flow=MeanFlowConfig())
    assert distilled(scm=SCMConfig()).task("", "").artifact.conditioning == "plain"


def test_an_unknown_student() -> None:
    nowhere = {"run": RunConfig(name="x"), "data": DataConfig(uri=""), "train": TRAIN}
    with pytest.raises(InvalidInputError, match=r"student = 'both'.*low_noise"):
        DistillConfig(**nowhere, teacher=TeacherConfig(uri=""), student="both")  # type: ignore[arg-type]


def test_texts_are_no_labels(distilled: Distill, tmp_path: Path, digits_uri: str) -> None:
    manifest = LatentManifest.load(str(tmp_path / "set"))
    architecture = replace(ARCHITECTURE, input_size=4, in_channels=4)
    write_model(tmp_path / "labels", artifact_config(manifest, architecture=architecture))
    expected = r"teacher has 10 classes, data.uri texts \(5, 12\)"
    with pytest.raises(InvalidInputError, match=expected):
        distilled(teacher=TeacherConfig(uri=str(tmp_path / "labels")))
    with pytest.raises(InvalidInputError, match=r"teacher's latents are \(4, 4, 4\)"):
        distilled(data=DataConfig(uri=digits_uri))


SIZE = WanNetworkConfig(
    patch_size=2,
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=48,
    freq_dim=32,
    fastest=20,
)


@pytest.fixture
def pretrained(tmp_path: Path, store: Store) -> Callable[..., PretrainPlan]:
    """``pretrained(field=value)`` -> the plan of a teacher of texts."""
    write_texts(tmp_path / "set")

    def make(**changes: Any) -> PretrainPlan:
        values: dict[str, Any] = {
            "run": RunConfig(name="teacher", storage_uri=str(tmp_path / "runs")),
            "data": DataConfig(uri=str(tmp_path / "set")),
            "wan": SIZE,
            "objective": FlowMatchingConfig(label_dropout=0.5),
            "train": TRAIN,
        }
        return pretrain.prepare(PretrainConfig(**values | changes))

    return make


@pytest.mark.usefixtures("process_group")
def test_a_teacher_of_texts_is_trained_with_their_null_prompt(
    pretrained: Callable[..., PretrainPlan], tmp_path: Path
) -> None:
    null = load_file(tmp_path / "set" / "null_text.safetensors")
    NullText(null["text_embedding"], null["text_mask"], "words", "abc").save(str(tmp_path / "set"))
    plan = pretrained()
    assert plan.architecture == WanConfig(
        height=4,
        width=4,
        in_channels=4,
        text_tokens=TEXT[0],
        text_dim=TEXT[1],
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        ffn_dim=48,
        freq_dim=32,
        fastest=20,
    )
    task = replace(plan.task("", ""), run_id=None)
    train(task, LocalContext(Path(task.folder_uri)))
    assert_plain(task)
    teacher = load_artifact(task.artifact_uri)
    assert (teacher.config.text_encoder_id, teacher.config.text_encoder_sha256) == ("words", "abc")
    for name, value in null.items():
        assert torch.equal(teacher.model.get_buffer(f"null_{name}"), value.float())


def test_a_teachers_size_is_one_for_the_rows(
    pretrained: Callable[..., PretrainPlan], digits_uri: str
) -> None:
    dit = NetworkConfig(patch_size=4, hidden_size=16, depth=1, num_heads=2)
    labels = DataConfig(uri=digits_uri)
    for problem, changes in {
        r"wan = None: the rows of data\.uri have texts": {"wan": None, "network": dit},
        r"network = .*: it does not read texts, which data\.uri has": {"network": dit},
        r"network = None: the rows of data\.uri have labels": {"data": labels},
        r"wan = .*: it does not read labels": {"data": labels, "network": dit},
        r"wan\.patch_size = .*: does not divide": {"wan": replace(SIZE, patch_size=3)},
    }.items():
        with pytest.raises(InvalidInputError, match=problem):
            pretrained(**changes)


def test_prompts_of_another_text_encoder_are_refused(distilled: Distill, tmp_path: Path) -> None:
    uri = str(tmp_path / "set")
    null = NullText.load(uri, LatentManifest.load(uri))
    encoder = load_artifact(str(tmp_path / "teacher")).config.text_encoder_sha256
    replace(null, encoder_id="another", encoder_sha256="abc").save(uri)
    with pytest.raises(InvalidInputError, match=r"data\.uri = .*embedded by another \(abc…\)"):
        distilled()
    replace(null, encoder_id="the same", encoder_sha256=encoder).save(uri)
    assert distilled().teacher.config.text_encoder_sha256 == encoder


def test_latents_of_another_autoencoder_are_refused(distilled: Distill, tmp_path: Path) -> None:
    """Of the same normalisation, which is all that training sees of it."""
    write_texts(tmp_path / "other")
    with pytest.raises(InvalidInputError, match=r"latents are those of the autoencoder .*…, data"):
        distilled(data=DataConfig(uri=str(tmp_path / "other")))


def test_a_student_is_asked_as_its_teacher_or_else_as_its_set(
    distilled: Distill, tmp_path: Path
) -> None:
    plan, set_uri = distilled(), str(tmp_path / "set")
    own = plan.teacher.config
    assert own.text_encoder_id
    null = NullText.load(set_uri, plan.manifest)
    replace(null, encoder_id="words", encoder_sha256=own.text_encoder_sha256).save(set_uri)
    unknown = replace(own, text_encoder_id="", text_encoder_sha256="")
    for teacher, expected in ((own, own.text_encoder_id), (unknown, "words")):
        asked = replace(plan, teacher=replace(plan.teacher, config=teacher)).task("", "").artifact
        assert asked.text_encoder_id == expected
        assert asked.text_encoder_sha256 == own.text_encoder_sha256
    # Imported latents have none; the teacher has its own null prompt.
    (tmp_path / "set" / "null_text.safetensors").unlink()
    assert distilled().task("", "").artifact.text_encoder_id == own.text_encoder_id


def test_the_guidance_is_told(distilled: Distill) -> None:
    its = "the teacher recommends 1.0 on [0.0, 1.0]"
    assert f"guidance: 1.75 on [0.125, 1.0]; {its}" in distilled().describe()
    same = FACMConfig(guidance=GuidanceConfig())
    assert "guidance: 1.0 on [0.0, 1.0]\n" in distilled(objective=same).describe()
