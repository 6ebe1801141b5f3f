"""What a run tells of its health, against the same by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from facm_core.objectives import FACM, FACMConfig
from facm_platform.latents import local_batches
from facm_platform.registry import load_artifact
from facm_platform.training.context import LocalContext, single_process_group
from facm_platform.training.health import peak_memory, update_to_weight
from facm_platform.training.loop import step_seed, train
from facm_platform.training.progress import TIME_BINS, MetricWindow
from facm_platform.training.task import TrainingTask
from tests.training.conftest import TRAIN, MakeTask


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """One rank."""
    with single_process_group():
        yield


def test_losses_by_time(make_task: MakeTask, tmp_path: Path) -> None:
    """Of the first step, row by row."""
    task = make_task(train=replace(TRAIN, log_images=8))
    context = Recording(tmp_path / "run")
    train(task, context)
    first = context.published[0]

    assert task.teacher_uri is not None
    teacher = load_artifact(task.teacher_uri).model
    student = load_artifact(task.teacher_uri).model
    facm = FACM(FACMConfig())
    (batch,) = local_batches(task.stream, 0, 8, 8)
    draws = facm.draw(batch.latents.shape, torch.Generator().manual_seed(step_seed(0, 0)))
    for task_name in ("loss_fm", "loss_cm"):
        losses: dict[int, list[float]] = {}
        for row in range(8):
            given = draws[row : row + 1].given()
            output = facm(
                student,
                batch.latents[row : row + 1],
                batch.condition[row : row + 1],
                teacher,
                **given,
            )
            losses.setdefault(int(draws.t[row] * TIME_BINS), []).append(
                float(output.metrics[task_name])
            )
        expected = {f"{task_name}/t{k}": sum(v) / len(v) for k, v in losses.items()}
        found = {name: value for name, value in first.items() if name.startswith(f"{task_name}/")}
        # A cosine near 1 is a difference of float32 numbers near 1.
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 <= first["data_wait_share"] <= 1
    assert 100 < first["memory_mib"] < 20_000
    assert 0 < first["update_to_weight"] < 1


class Recording(LocalContext):
    """Keeps what monitoring would see."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.published: list[dict[str, float]] = []

    def publish(self, metrics: dict[str, float]) -> None:
        self.published.append(metrics)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_to_weight_is_that_of_the_last_step(weight_decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 20).double()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=weight_decay)
    assert update_to_weight(adamw) != update_to_weight(adamw)
    for _ in range(5):
        before = [p.detach().clone() for p in model.parameters()]
        adamw.zero_grad()
        model(torch.randn(4, 20, dtype=torch.float64)).square().sum().backward()
        adamw.step()
    after = [p.detach() for p in model.parameters()]
    change = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)) ** 0.5
    size = sum(float(a.square().sum()) for a in after) ** 0.5
    assert update_to_weight(adamw) == pytest.approx(change / size, rel=1e-3)


def test_a_window_averages_rows_over_all_its_steps() -> None:
    window = MetricWindow()
    for _ in range(2):
        window.add({"loss": torch.tensor(2.0)}, 4)
    window.add_rows({"t": torch.tensor([0.0, 0.1, 1.0]), "x": torch.tensor([1.0, 2.0, 5.0])})
    window.add_rows({"t": torch.tensor([0.12]), "x": torch.tensor([6.0])})
    closed = window.close()
    assert {name: closed[name] for name in closed if "/" in name} == {"x/t0": 3.0, "x/t7": 5.0}
    assert closed["loss"] == 2


def test_peak_memory_is_this_process() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_memory(torch.device("cpu")) - before > 0.9 * held.nbytes


def plain_gradient(task: TrainingTask, config: FACMConfig, start: int) -> torch.Tensor:
    """Of a batch, for a student that is the teacher."""
    assert task.teacher_uri is not None
    student, teacher = (load_artifact(task.teacher_uri).model for _ in range(2))
    parameters = [p.requires_grad_() for n, p in student.named_parameters() if n != "pos_embed"]
    (batch,) = local_batches(task.stream, start, start + 8, 8)
    generator = torch.Generator().manual_seed(step_seed(0, start))
    loss = FACM(config)(student, batch.latents, batch.condition, teacher, generator=generator).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def test_cosine_of_the_gradients_and_drift_of_the_anchor(
    make_task: MakeTask, tmp_path: Path
) -> None:
    """After steps that change nothing, so that the student is the teacher."""
    settings = replace(TRAIN, learning_rate=1e-30, health_images=32, log_images=16)
    task = make_task(train=settings)
    context = Recording(tmp_path / "run")
    train(task, context)
    looks = [metrics for metrics in context.published if "anchor_drift" in metrics]
    assert len(context.published) == 6
    assert len(looks) == 3

    config = FACMConfig()
    fm = plain_gradient(task, replace(config, lambda_cm=0), 24)
    cm = plain_gradient(task, replace(config, lambda_fm=0), 24)
    expected = float(torch.dot(fm, cm) / fm.norm() / cm.norm())
    assert looks[0]["gradient_cosine"] == pytest.approx(expected, abs=1e-3)

    # The student's velocity is the teacher's own, the target is guided.
    assert task.teacher_uri is not None
    teacher = load_artifact(task.teacher_uri).model
    (batch,) = local_batches(task.stream, 0, 8, 8)
    draws = FACM(config).draw(batch.latents.shape, torch.Generator().manual_seed(0))
    t = draws.t[:, None, None, None]
    x_t = t * batch.latents + (1 - t) * draws.x_0
    null = torch.full_like(batch.condition, 10)
    label = torch.where(draws.dropped, null, batch.condition)
    with torch.no_grad():
        conditional, unconditional = teacher(x_t, draws.t, label), teacher(x_t, draws.t, null)
        student = teacher(x_t, 2 - draws.t, label)
    inside = (draws.t >= config.guidance.low) & (draws.t <= config.guidance.high) & ~draws.dropped
    scale = torch.where(inside, config.guidance.scale, 1.0)[:, None, None, None]
    guided = unconditional + scale * (conditional - unconditional)
    expected = float((student - guided).norm() / guided.norm())
    assert [look["anchor_drift"] for look in looks] == pytest.approx([expected] * 3, rel=1e-4)


def test_a_task_without_weight_has_no_cosine(make_task: MakeTask, tmp_path: Path) -> None:
    settings = replace(TRAIN, images=16, health_images=16)
    task = make_task(train=settings, objective=FACMConfig(lambda_fm=0))
    context = Recording(tmp_path / "run")
    train(task, context)
    assert "anchor_drift" in context.published[-1]
    assert "gradient_cosine" not in context.published[-1]
