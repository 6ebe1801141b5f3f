"""Students that are adapters: against peft in one plain process, and against their teacher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from facm_core.errors import InvalidInputError
from facm_core.models import LightningDiT
from facm_platform.config import load_config
from facm_platform.registry import load_artifact
from facm_platform.training.config import LoraConfig, TrainConfig, WorkersConfig
from facm_platform.training.context import LocalContext
from facm_platform.training.distill import DistillConfig, DistillPlan, prepare
from facm_platform.training.export import export
from facm_platform.training.launch import launch
from facm_platform.training.loop import _Trainer, train
from facm_platform.training.lora import add_adapters, merged
from facm_platform.training.memory import worker_memory
from facm_platform.training.speed import worker_flops
from facm_platform.training.task import TrainingTask
from tests.small import ARCHITECTURE
from tests.training.conftest import (
    TRAIN,
    Interrupted,
    InterruptedContext,
    MakeTask,
    plain_training,
    weights,
)
from tests.training.test_wan import Distill, distilled, task_of  # noqa: F401  (a fixture)

LORA = LoraConfig(rank=3, alpha=6.0, targets=("attn.qkv", "mlp.w3"))
WAN_LORA = LoraConfig(rank=2, targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.2"))
ADAPTED = ("attn.qkv.weight", "mlp.w3.weight")
# Adapters start at B = 0, where the rate that suits weights hardly moves them.
FAST = replace(TRAIN, learning_rate=1e-2)


def in_folder(task: TrainingTask, folder: Path) -> TrainingTask:
    return replace(task, folder_uri=str(folder))


def run(task: TrainingTask) -> dict[str, torch.Tensor]:
    train(task, LocalContext(Path(task.folder_uri)))
    return weights(task)


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def teacher_of(task: TrainingTask) -> dict[str, torch.Tensor]:
    assert task.teacher_uri is not None
    return load_artifact(task.teacher_uri).model.state_dict()


# --- what is trained ----------------------------------------------------------------------------


@pytest.mark.usefixtures("process_group")
def test_at_first_the_student_is_the_teacher(make_task: MakeTask, tmp_path: Path) -> None:
    trainer = _Trainer(make_task(lora=LORA), LocalContext(tmp_path / "run"))
    student, teacher = trainer.state.student, trainer.teacher
    assert teacher is not None
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        assert torch.equal(student(x, t, label), teacher(x, t, label))
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * ARCHITECTURE.depth
    assert all(".lora_" in name for name in trained)
    averaged = trainer.state.ema.profiles["0.2"]
    assert list(averaged) == trained
    (group,) = trainer.state.optimizer.param_groups
    assert len(group["params"]) == len(trained)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("options", [{}, {"recompute": True, "micro_batch_size": 3}])
def test_the_loop_equals_peft_in_a_plain_process(
    make_task: MakeTask, options: dict[str, Any]
) -> None:
    task = make_task(lora=LORA, train=replace(TRAIN, **options))
    got, teacher = run(task), teacher_of(task)
    assert_near(got, plain_training(task))
    for name, tensor in teacher.items():
        assert torch.equal(got[name], tensor) == (not name.endswith(ADAPTED)), name


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_equal_peft_in_a_plain_process(make_task: MakeTask) -> None:
    task = make_task(lora=LORA)
    launch(task, WorkersConfig(max=2))
    assert_near(weights(task), plain_training(task))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("student", ["same", "low_noise"])
def test_a_wan_or_one_of_its_experts(distilled: Distill, student: str) -> None:  # noqa: F811
    task = task_of(distilled(student=student, lora=WAN_LORA))
    got, teacher = run(task), teacher_of(task)
    expected = plain_training(task)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        start = teacher[name if student == "same" else f"low_noise.{name}"]
        moved = (tensor - start).norm()
        assert (got[name] - tensor).norm() <= 1e-3 * moved, name
        adapted = any(f".{target}.weight" in name for target in WAN_LORA.targets or ())
        assert bool(moved) == adapted, name


@pytest.mark.usefixtures("process_group")
def test_a_resumed_run_ends_with_the_same_bits(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(lora=LORA, train=replace(FAST, health_images=32))
    whole, halves = in_folder(task, tmp_path / "whole"), in_folder(task, tmp_path / "halves")
    metrics = train(whole, LocalContext(tmp_path / "whole"))
    assert {"anchor_drift", "gradient_cosine", "update_to_weight"} <= metrics.keys()
    with pytest.raises(Interrupted):
        train(halves, InterruptedContext(tmp_path / "halves", batches_left=7))
    expected, got = weights(whole), run(halves)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"offload": True}, 1e-6), ({"compile": True}, 1e-5), ({"precision": "bfloat16"}, 2e-2)],
)
def test_options_of_the_training(
    make_task: MakeTask, tmp_path: Path, options: dict[str, Any], tolerance: float
) -> None:
    """The mean loss of two steps, of which the first is the teacher's; and adapters move."""
    losses = []
    for name, more in (("plain", {}), ("other", options)):
        task = make_task(lora=LORA, train=replace(FAST, images=16, **more))
        losses.append(train(in_folder(task, tmp_path / name), LocalContext(tmp_path / name)))
        start, end = teacher_of(task), weights(in_folder(task, tmp_path / name))
        adapted = {key for key in end if not torch.equal(end[key], start[key])}
        assert adapted == {key for key in end if key.endswith(ADAPTED)}
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=tolerance)


# --- what comes out -----------------------------------------------------------------------------


def test_merged_weights_are_the_function_of_the_adapters() -> None:
    torch.manual_seed(0)
    network, plain = LightningDiT(ARCHITECTURE), LightningDiT(ARCHITECTURE)
    add_adapters(network, LORA, ARCHITECTURE)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 0.1)
    plain.load_state_dict(dict(merged(network.state_dict(), LORA)))
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 9, 10])
    got, expected = plain(x, t, label), network(x, t, label)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for module in list(network.modules()):
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    assert (network(x, t, label) - expected).abs().max() > 0.1


@pytest.mark.usefixtures("process_group")
def test_exported_checkpoints_are_merged(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(lora=LORA, train=replace(FAST, images=192))
    first = run(task)
    (last,) = Path(task.folder_uri).glob("checkpoint_*000192")
    export(str(last), str(tmp_path / "exported"))
    again = load_artifact(str(tmp_path / "exported"))
    assert again.sha256 == load_artifact(task.artifact_uri).sha256
    export(str(last), str(tmp_path / "wider"), 0.15)
    tracked = replace(task.train, ema_sigma_rels=(0.15,), export_sigma_rel=0.15)
    expected = run(in_folder(replace(task, train=tracked), tmp_path / "tracked"))
    got = load_artifact(str(tmp_path / "wider")).model.state_dict()
    for name in first:
        if name.endswith(ADAPTED):
            near, far = (got[name] - expected[name]).norm(), (first[name] - expected[name]).norm()
            assert near < 0.2 * far, name
        else:
            assert torch.equal(got[name], first[name]), name


# --- the recipe ---------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path: Path, digits_uri: str, teacher_uri: str) -> Callable[..., DistillPlan]:
    """``planned("lora.rank=4")`` -> the plan of a distillation."""

    def plan(*options: str) -> DistillPlan:
        given = [f"run.storage_uri={tmp_path}", f"data.uri={digits_uri}", "train.images=96"]
        given += ["run.name=run", f"teacher.uri={teacher_uri}", "train.global_batch_size=8"]
        return prepare(load_config(DistillConfig, None, [*given, *options]))

    return plan


def test_a_recipe_names_the_adapters(planned: Callable[..., DistillPlan]) -> None:
    assert planned().task("", "").lora is None
    task = planned("lora.rank=4", "lora.targets=[attn.qkv]").task("", "")
    assert task.lora == LoraConfig(rank=4, targets=("attn.qkv",))
    assert planned("lora={}").task("", "").lora == LoraConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.rank=0"], "lora.rank = 0: below 1"),
        (["lora.alpha=0"], "lora.alpha = 0.0: not positive"),
        (["lora.targets=[]"], r"lora.targets = \(\): no layer would be trained"),
        (
            ["lora.targets=[attn.qkv,to_q]"],
            r"lora.targets = 'to_q': no layer has a name that ends so. Use names, or ends of names "
            r"after a dot, of adaLN_modulation.1, attn.proj, attn.qkv, .*mlp.w12, mlp.w3, t_emb",
        ),
        (["lora.targets=[proj]"], r"lora.targets = 'proj': x_embedder.proj is no linear layer"),
        (["lora={}", "mean_flow={}"], "lora = 'given': mean_flow with this .* second time embed"),
        (["lora={}", "objective.conditioning=auxiliary"], "objective with .*lora=null"),
    ],
)
def test_what_makes_no_sense(
    planned: Callable[..., DistillPlan], options: list[str], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        planned(*options)


def test_without_peft(planned: Callable[..., DistillPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    planned()
    with pytest.raises(InvalidInputError, match=r"lora = .*not installed.*pip install peft"):
        planned("lora={}")


def test_the_memory_of_adapters(planned: Callable[..., DistillPlan]) -> None:
    """Optimizer, averages and gradients are those of the adapters; the teacher's size stays."""
    network = LightningDiT(ARCHITECTURE)
    whole = 4 * sum(p.numel() for p in network.parameters())
    usual = ["attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"]
    config = peft.LoraConfig(r=4, target_modules=usual)
    peft.inject_adapter_in_model(config, network)
    adapters = 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    settings = TrainConfig(images=8, global_batch_size=8)
    lora = LoraConfig(rank=4)
    found = worker_memory(ARCHITECTURE, settings, 2, teachers=1, lora=lora)
    assert found.teachers == whole // 2
    assert found.parameters == (whole + adapters) // 2
    assert found.gradients == adapters // 2
    assert found.optimizer == found.averages == adapters
    without = worker_memory(ARCHITECTURE, settings, 2, teachers=1)
    assert found.unsharded < without.unsharded

    # What they save is the product that gives a frozen weight's gradient, one of many.
    work, less = (
        worker_flops(ARCHITECTURE, settings, 2, teachers=1, lora=one) for one in (None, lora)
    )
    assert 0.7 * work < less < 0.97 * work

    plan = planned("lora.rank=9999", "workers.max=2")
    large = worker_memory(
        ARCHITECTURE, plan.config.train, 2, teachers=1, lora=LoraConfig(rank=9999)
    )
    assert large.optimizer > 10 * 2**20
    told = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in large.rows())
    assert told in plan.describe()
