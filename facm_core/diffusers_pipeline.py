"""FACM students in diffusers' own `WanPipeline`: a scheduler, and the folder that it loads.

```python
save_pipeline(folder, student, FewStepScheduler(shift=5.0))

import facm_core.diffusers_pipeline  # or diffusers does not know the scheduler

pipeline = WanPipeline.from_pretrained(folder, vae=vae, text_encoder=encoder, tokenizer=tokenizer)
pipeline("a prompt", num_frames=1, num_inference_steps=4, guidance_scale=1.0)
```

The pipeline's own default is a guidance scale of 5; a student has its guidance inside and wants 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_core.interpolant import interpolate, predict_data
from facm_core.models.adapters import WanAdapter
from facm_core.models.experts import Experts
from facm_core.models.time_scale import drop_fast_weights
from facm_core.samplers import sample_noise, time_grid


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The samplers of `facm_core.samplers` as a diffusers scheduler.

    Its networks predict noise − data, and are told a timestep, 1000·(1 − t).

    Args:
        sampler: ``consistency``: the shortcut, told t, with new noise after each step but the last.
            ``euler``: the flow of a network that is told t. ``anchor``: the flow that a student
            with expanded conditioning keeps, told 2 − t: its timesteps are negative.
        shift: Of noise levels as in diffusers, σ -> s·σ / (1 + (s − 1)·σ): 3 or 5 for Wan, which
            is `sample_euler`'s shift of 1/s.
        num_train_timesteps: The timestep of noise; 1000 for every network of `WanAdapter`.

    Attributes:
        seeds: Of the new noise, one a row, as of `sample_consistency`; None: `noise_seeds` of the
            first step's sample.
    """

    order = 1

    def __init__(
        self,
        sampler: str = "consistency",
        shift: float = 1.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        require_one_of("sampler", sampler, ("consistency", "euler", "anchor"))
        require(shift > 0, "shift", shift, "not positive", "Use 1 for an even grid")
        self.sampler, self.shift, self.noise_timestep = sampler, shift, num_train_timesteps
        settings = {"sampler": sampler, "shift": shift, "num_train_timesteps": num_train_timesteps}
        self.register_to_config(**settings)  # type: ignore[no-untyped-call]
        self.seeds: Sequence[int] | None = None
        self._steps_done = 0

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Begin a sample of so many steps, one function evaluation each."""
        self._times = time_grid(num_inference_steps, 1 / self.shift)
        t = self._times[:-1].float()
        told = 2 - t if self.sampler == "anchor" else t
        self.timesteps = self.noise_timestep * (1 - told).to(device)
        self.sigmas = 1 - self._times
        self._steps_done = 0

    def set_begin_index(self, begin_index: int) -> None:
        """Begin at this step."""
        self._steps_done = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,  # of the next step, which the scheduler knows
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step from `sample` (B, …); arithmetic in float64.

        The pipeline hands its generator to no scheduler, so new noise comes from `seeds`, or from
        that of the first step: `noise_seeds` of `sample` there are those of `sample_consistency`.

        Raises:
            InvalidInputError: `seeds` are not one a row.
        """
        i = self._steps_done
        t, t_next = (self._times[j].expand(len(sample)).to(sample.device) for j in (i, i + 1))
        x, velocity = sample.double(), -model_output.double()
        if self.sampler == "consistency":
            if i == 0:
                self._seeds = noise_seeds(sample) if self.seeds is None else list(self.seeds)
                fits, remedy = len(self._seeds) == len(sample), "Give as many, or None"
                problem = f"not one for each of {len(sample)} rows"
                require(fits, "scheduler.seeds", self._seeds, problem, remedy)
            x = predict_data(x, t, velocity)
            if i + 1 < len(self.timesteps):
                epsilon = sample_noise(sample.shape[1:], self._seeds, stream=i + 1).to(x)
                x = interpolate(epsilon, x, t_next)
        else:
            x = x + float(self._times[i + 1] - self._times[i]) * velocity
        self._steps_done += 1
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


def noise_seeds(noise: Tensor) -> list[int]:
    """A seed for each row of `noise` (B, …), of its float32 values alone."""
    rows = noise.detach().float().cpu().contiguous().numpy()
    return [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big") for row in rows]


def save_pipeline(
    folder: str | Path,
    student: Any,
    scheduler: FewStepScheduler | FlowMatchEulerDiscreteScheduler,
) -> None:
    """Write `student` as a folder for ``WanPipeline.from_pretrained(folder, vae=…, …)``.

    ``transformer/``, for experts also ``transformer_2/``, with safetensors and configuration, and
    ``scheduler/``. A student with slow time embeddings becomes an ordinary Wan network: the weights
    of the sinusoids that it leaves out are zero. For the anchor, whose timesteps rise from −1000,
    the experts change places.

    Args:
        folder: Made if it is not there.
        student: `WanAdapter`, or `Experts` of two; not sharded. Or a teacher.
        scheduler: How it is to be sampled; a teacher by diffusers' own.

    Raises:
        InvalidInputError: another kind of student.
    """
    networks = _networks(student)
    for network in networks:
        drop_fast_weights(network)
    boundary: dict[str, Any] = {}
    if isinstance(student, Experts):
        boundary = {"boundary_ratio": student.boundary}
        if isinstance(scheduler, FewStepScheduler) and scheduler.sampler == "anchor":
            # The pipeline asks `transformer` at timesteps from the boundary up, where the anchor's
            # have little noise; −1000·boundary itself is the noisy expert's.
            networks = networks[::-1]
            above = np.nextafter(np.float32(-1000 * student.boundary), np.float32(0))
            boundary = {"boundary_ratio": float(above) / 1000}
    pipeline: Any = WanPipeline(  # type: ignore[no-untyped-call]
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        **dict(zip(("transformer", "transformer_2")[: len(networks)], networks, strict=True)),
        **boundary,
    )
    pipeline.save_config(folder)
    for name, component in pipeline.components.items():
        if component is not None:
            component.save_pretrained(Path(folder) / name)


def _networks(student: Any) -> list[Any]:
    """The diffusers networks, the noisy expert's first."""
    parts: list[Any] = [student]
    if isinstance(student, Experts):
        parts = [student.high_noise, student.low_noise]
    for part in parts:
        if not isinstance(part, WanAdapter):
            raise InvalidInputError(
                "student",
                type(part).__name__,
                "WanPipeline runs no such network",
                "Use a WanAdapter, or Experts of two",
            )
    return [part.network for part in parts]
