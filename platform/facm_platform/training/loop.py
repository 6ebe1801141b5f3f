"""The training loop, the same for every objective, under Ray Train or in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from facm_core.ema import PowerEMA
from facm_core.models import LightningDiT
from facm_core.objectives import Draws
from facm_platform.latents import Batch
from facm_platform.registry import load_artifact, save_artifact
from facm_platform.storage import upload_folder
from facm_platform.tracking import MetricSender
from facm_platform.training.checkpoint import TrainState
from facm_platform.training.context import WorkerContext
from facm_platform.training.parallel import gather, mean_over_workers, shard, whole
from facm_platform.training.progress import MetricWindow, progress_line
from facm_platform.training.task import TrainingTask


def train(task: TrainingTask, context: WorkerContext) -> dict[str, float]:
    """Run `task` from its last checkpoint to its end and write the model artefact.

    Returns:
        Metrics of the last log window.

    Raises:
        FloatingPointError: too many steps in a row were not finite.
    """
    return _Trainer(task, context).run()


def step_seed(seed: int, images_seen: int) -> int:
    """Seed of one step's draws: every worker, and every resumed run, draws the same."""
    state = np.random.SeedSequence((seed, images_seen)).generate_state(1, np.uint64)
    return int(state[0] >> 1)


class _Trainer:
    def __init__(self, task: TrainingTask, context: WorkerContext) -> None:
        self.task, self.context, self.settings = task, context, task.train
        self.objective = task.build_objective()
        student, self.teacher = self._networks()
        self.state = TrainState(
            student=student,
            optimizer=torch.optim.AdamW(
                (parameter for parameter in student.parameters() if parameter.requires_grad),
                lr=self.settings.learning_rate,
                betas=self.settings.betas,
                weight_decay=self.settings.weight_decay,
            ),
            ema=PowerEMA(student, self.settings.ema_sigma_rels),
        )

    def run(self) -> dict[str, float]:
        state = self.state
        with self.context.last_checkpoint() as folder:
            if folder is not None:
                state.read(folder)
                self._say(f"{self.task.job}: resumed at {state.images_seen:,} images")
        with self._metric_sender() as sender:
            window, skipped_in_a_row = MetricWindow(), 0
            for batch in self._batches():
                finite = self._step(batch, window)
                skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
                if skipped_in_a_row >= self.settings.max_skipped_in_a_row:
                    raise FloatingPointError(
                        f"{skipped_in_a_row} steps in a row were not finite, up to "
                        f"{state.images_seen} images: lower train.learning_rate, or look at the "
                        "latent set"
                    )
                if self._due(self.settings.log_images) and window.steps:
                    state.metrics = window.close() | {"skipped_steps": float(state.skipped_steps)}
                    window = MetricWindow()
                    self._log(sender)
                if self._due(self.settings.checkpoint_images):
                    self.context.save_checkpoint(state.metrics, self._write)
        self._export()
        return state.metrics

    def _networks(self) -> tuple[LightningDiT, LightningDiT | None]:
        """Student and teacher, sharded. A distilled student starts from the teacher's weights."""
        task, settings = self.task, self.settings
        spread = partial(
            shard,
            device=self.context.device,
            precision=settings.precision,
            reshard_after_forward=settings.reshard_after_forward,
        )
        torch.manual_seed(settings.seed)
        student, teacher = LightningDiT(task.artifact.architecture), None
        if task.teacher_uri is not None:
            teacher = load_artifact(task.teacher_uri).model
            # A second time embedding, which the teacher has not, adds nothing at first.
            student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
            teacher = spread(teacher)
        return spread(student), teacher

    def _step(self, batch: Batch, window: MetricWindow) -> bool:
        """One optimizer step; False if it was skipped because something was not finite."""
        state, device = self.state, self.context.device
        batch_size = self.settings.global_batch_size
        draws, batch = self._draws(batch), batch.to(device)
        output = self.objective(
            state.student,
            batch.latents,
            batch.condition,
            self.teacher,
            **draws.to(device).given(),
            images_seen=state.images_seen,
        )
        state.optimizer.zero_grad()
        output.loss.backward()
        parameters = state.student.parameters()
        norm = whole(clip_grad_norm_(parameters, self.settings.max_grad_norm)).detach()
        loss = mean_over_workers(output.loss.detach().clone())
        # Both are the same on every rank, so all ranks decide alike.
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        state.images_seen += batch_size
        if finite:
            self._set_learning_rate()
            state.optimizer.step()
            state.ema.update(state.student, images_seen=state.images_seen, images_step=batch_size)
            window.add({"loss": loss, "gradient_norm": norm, **output.metrics}, batch_size)
        else:
            state.skipped_steps += 1
            self._say(f"step skipped: loss {loss.item()}, gradient norm {norm.item()}")
        return finite

    def _draws(self, batch: Batch) -> Draws:
        """This rank's rows of the global batch's random draws."""
        shape = (self.settings.global_batch_size, *batch.latents.shape[1:])
        seed = step_seed(self.settings.seed, self.state.images_seen)
        draws = self.objective.draw(shape, torch.Generator().manual_seed(seed))
        return draws.share(self.context.rank, self.context.world_size)

    def _batches(self) -> Iterator[Batch]:
        """What is left of the run, this rank's share."""
        settings = self.settings
        return self.context.batches(
            self.task.stream,
            self.state.images_seen,
            settings.total_images,
            settings.global_batch_size,
        )

    def _set_learning_rate(self) -> None:
        warmup = self.settings.warmup_images
        share = min(1.0, self.state.images_seen / warmup) if warmup else 1.0
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * share

    def _due(self, every_images: int) -> bool:
        """Whether the last step reached a multiple of `every_images`, or the end."""
        seen, batch_size = self.state.images_seen, self.settings.global_batch_size
        return seen % every_images < batch_size or seen == self.settings.total_images

    def _log(self, sender: MetricSender | None) -> None:
        state = self.state
        total = self.settings.total_images
        self._say(progress_line(self.task.job, state.images_seen, total, state.metrics))
        if sender is not None:
            sender.send(state.metrics, state.images_seen)

    def _write(self, folder: Path) -> None:
        self.state.write(folder, self.context.rank)

    def _export(self) -> None:
        """Rank 0 writes the averaged weights as a model artefact into the run's folder."""
        averages = self.state.ema.profiles[str(self.settings.export_sigma_rel)]
        weights = gather({**dict(self.state.student.named_buffers()), **averages})
        if self.context.rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                save_artifact(Path(folder), weights, self.task.artifact)
                upload_folder(Path(folder), self.task.artifact_uri)

    @contextmanager
    def _metric_sender(self) -> Iterator[MetricSender | None]:
        """Rank 0's way to MLflow."""
        if self.context.rank != 0 or self.task.run_id is None:
            yield None
            return
        spool = Path(tempfile.gettempdir()) / "facm_metrics" / f"{self.task.run_id}.jsonl"
        sender = MetricSender(self.task.tracking_uri, self.task.run_id, spool)
        try:
            yield sender
        finally:
            sender.close()

    def _say(self, text: str) -> None:
        if self.context.rank == 0:
            print(text, flush=True)
