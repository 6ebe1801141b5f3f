"""What the tests of the mathematics share: one thread, small networks, the FACM oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from facm_core.models import LightningDiT, LightningDiTConfig

MakeModel = Callable[..., LightningDiT]
MakeBatch = Callable[..., dict[str, Tensor]]


# Of the module, so that it comes before the other fixtures of a module.
@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """``make_model(seed, **fields of the config)``: float64, and no weight at its zero start."""

    def make(seed: int = 0, **settings: Any) -> LightningDiT:
        small = {"input_size": 4, "in_channels": 3, "patch_size": 2, "num_classes": 5}
        small |= {"hidden_size": 16, "depth": 2, "num_heads": 2}
        model = LightningDiT(LightningDiTConfig(**small | settings)).double()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """Every input of one FACM step, by name; times on both sides of the interval [0.125, 1]."""

    def make(channels: int = 3, size: int = 4) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(11)
        x_1, x_0 = torch.randn(2, 6, channels, size, size, generator=generator).double()
        return {
            "x_1": x_1,
            "condition": torch.tensor([0, 4, 2, 3, 1, 2]),
            "x_0": x_0,
            "t": torch.tensor([0.125, 0.4, 0.7, 0.99, 0.06, 0.1], dtype=torch.float64),
            "dropped": torch.tensor([False, False, True, False, False, True]),
        }

    return make


@dataclass(frozen=True, kw_only=True)
class FACMOracle:
    """FACM from the formulas of the paper (arXiv 2507.03738): one sample at a time, in float64,
    with `torch.func.jvp` over the whole network. Shares nothing with the objective but the network.
    """

    auxiliary: bool = False
    w: float = 1.0
    low: float = 0.125
    high: float = 1.0
    p: float = 0.5
    c: float = 1e-3
    lambda_cm: float = 1.0
    lambda_fm: float = 1.0
    clip: float = 1.0
    null_label: int = 5

    def __call__(
        self, student: LightningDiT, teacher: LightningDiT | None, batch: dict[str, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and its gradient by parameter name."""
        samples = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        with sdpa_kernel(SDPBackend.MATH):
            losses = [self.sample_loss(student, teacher, **sample) for sample in samples]
        loss = torch.stack(losses).mean()
        named = {n: p for n, p in student.named_parameters() if p.requires_grad}
        return loss.item(), dict(
            zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)
        )

    def sample_loss(
        self,
        student: LightningDiT,
        teacher: LightningDiT | None,
        x_1: Tensor,
        condition: Tensor,
        x_0: Tensor,
        t: Tensor,
        dropped: Tensor,
    ) -> Tensor:
        null = torch.tensor(self.null_label)
        label = null if dropped else condition
        x_t = t * x_1 + (1 - t) * x_0
        anchor = (t, t) if self.auxiliary else (2 - t, None)

        with torch.no_grad():
            if teacher is None:
                v_c, v_u = x_1 - x_0, ask(student, x_t, anchor[0], null, anchor[1])
            else:
                r = t if teacher.config.second_time else None
                v_c, v_u = ask(teacher, x_t, t, label, r), ask(teacher, x_t, t, null, r)
            guided = self.low <= t <= self.high and not dropped
            v = v_u + self.w * (v_c - v_u) if guided else v_c

        f = ask(student, x_t, anchor[0], label, anchor[1])
        pixels = (f.reshape(1, -1), v.reshape(1, -1)) if len(f) == 1 else (flat(f), flat(v))
        loss_fm = ((f - v) ** 2).mean() + (1 - cosine(*pixels)).mean()

        one = torch.tensor(1.0, dtype=t.dtype) if self.auxiliary else None
        f, df_dt = torch.func.jvp(
            lambda x, t: ask(student, x, t, label, one), (x_t, t), (v, torch.ones_like(t))
        )
        f_sg, df_dt = f.detach(), df_dt.detach()
        v_bar = v + (1 - t) * df_dt
        g = f_sg - v_bar
        target = f_sg - (1 - t**self.p) * g.clip(-self.clip, self.clip)
        e = ((f - target) ** 2).mean()
        loss_cm = math.cos(math.pi * t / 2) * e / (e.detach() + self.c) ** 0.5
        return self.lambda_cm * loss_cm + self.lambda_fm * loss_fm


def ask(model: LightningDiT, x: Tensor, t: Tensor, label: Tensor, r: Tensor | None) -> Tensor:
    """The network on one sample."""
    return model(x[None], t[None], label[None], None if r is None else r[None])[0]


def flat(x: Tensor) -> Tensor:
    """(C, H, W) -> (H·W, C)."""
    return x.flatten(1).T


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Row by row."""
    return (a * b).sum(1) / ((a * a).sum(1).sqrt() * (b * b).sum(1).sqrt())


@pytest.fixture(scope="session")
def facm_oracle() -> type[FACMOracle]:
    return FACMOracle


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Norm of the difference over the norm of what is expected, tensor by tensor, below `rel`."""

    def check(got: dict[str, Tensor], expected: dict[str, Tensor], rel: float) -> None:
        assert got.keys() == expected.keys()
        errors = {n: float((got[n] - e).norm() / e.norm()) for n, e in expected.items()}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < rel, f"{worst}: relative error {errors[worst]:.1e}"
        assert all(error < rel for error in errors.values()), "not a number"
        assert all(e.norm() > 0 for e in expected.values()), "an expected tensor is zero"

    return check


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network's code casts to float32 becomes float64, to be compared to ten digits."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
