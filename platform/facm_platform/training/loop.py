"""The training loop, the same for every objective, under Ray Train or in this process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import clip_grad_norm_

from facm_core.ema import PowerEMA
from facm_core.errors import InvalidInputError
from facm_core.objectives import FACM, Draws, Objective
from facm_platform.latents import Batch
from facm_platform.latents.stream import dealt_to
from facm_platform.registry import upload_artifact, write_artifact
from facm_platform.storage import join, local_copy, write_bytes
from facm_platform.tracking import MetricSender
from facm_platform.training.checkpoint import StagedState, TrainState
from facm_platform.training.context import WorkerContext
from facm_platform.training.health import (
    AnchorDrift,
    gradient_cosine,
    peak_memory,
    update_to_weight,
)
from facm_platform.training.lora import merged
from facm_platform.training.networks import networks
from facm_platform.training.parallel import (
    Sharding,
    differing_replicas,
    mean_over_workers,
    whole,
)
from facm_platform.training.progress import Clock, MetricWindow, Notices, progress_line
from facm_platform.training.task import Hopeless, TrainingTask


def train(task: TrainingTask, context: WorkerContext) -> dict[str, float]:
    """Run `task` from its last checkpoint to its end and write the model artefact.

    Returns:
        Metrics of the last log window.

    Raises:
        Hopeless: to begin again would end the same way; all ranks raise it together.
    """
    return _Trainer(task, context).run()


def step_seed(seed: int, images_seen: int, rollbacks: int = 0) -> int:
    """Seed of one step's draws: every worker, and every resumed run, draws the same."""
    entropy = (seed, images_seen, rollbacks) if rollbacks else (seed, images_seen)
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return int(state[0] >> 1)


# On which the drift of the anchor is measured.
_ANCHOR_ROWS = 64

# Of a run: enough to see what is wrong.
_KEPT_BATCHES = 20


class _Trainer:
    def __init__(self, task: TrainingTask, context: WorkerContext) -> None:
        self.task, self.context, self.settings = task, context, task.train
        self.objective, self._method = task.build_objective(), task.objective
        self._sharding = Sharding(
            precision=self.settings.precision,
            replicas=self.settings.replicas,
            reshard_after_forward=self.settings.reshard_after_forward,
            offload=self.settings.offload,
            compile=self.settings.compile,
        )
        student, self.teacher = networks(task, context, self._sharding)
        trained = nn.ModuleDict({"student": student})
        if isinstance(self.objective, nn.Module):
            self._sharding.apply_to_parts(self.objective, context.device)
            trained["objective"] = self.objective
        self.state = TrainState(
            trained=trained,
            optimizer=torch.optim.AdamW(
                (parameter for parameter in trained.parameters() if parameter.requires_grad),
                lr=self.settings.learning_rate,
                betas=self.settings.betas,
                weight_decay=self.settings.weight_decay,
                fused=self.settings.fused,
            ),
            ema=PowerEMA(student, self.settings.ema_sigma_rels),
        )

    def run(self) -> dict[str, float]:
        self._resume()
        self._clock = Clock(self.settings.max_hours)
        self._left = self._checked = False
        self._anchor: AnchorDrift | None = None
        with self._metric_sender() as sender:
            while not self._train(sender):
                self._roll_back()
        self._moved("exporting")
        self._export()
        return self.state.metrics

    def _resume(self) -> bool:
        """Whether there was a checkpoint to take the state from."""
        with ExitStack() as stack:
            folder = stack.enter_context(self.context.last_checkpoint())
            if folder is None and self.task.start_uri is not None:
                folder = stack.enter_context(local_copy(self.task.start_uri))
            if folder is None:
                return False
            try:
                self.state.read(folder)
            except InvalidInputError as error:
                raise Hopeless(error) from error
        self._say(f"{self.task.job}: resumed at {self.state.images_seen:,} images")
        return True

    def _train(self, sender: MetricSender | None) -> bool:
        """Train to the end; False if too many steps in a row were not finite."""
        state, settings = self.state, self.task.train
        window, skipped_in_a_row, due = MetricWindow(), 0, False
        self._saved = self._committed = state.images_seen
        may_be_lost = settings.max_lost_images or 2 * settings.checkpoint_images
        batches = self._batches()
        while (batch := self._next(batches, window)) is not None:
            self._moved("in a step")
            self._enter_stage()
            if state.images_seen + settings.global_batch_size > self._committed + may_be_lost:
                self._commit(window)
            draws = self._draws(batch)
            finite, notices = self._step(batch, draws, window)
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            if skipped_in_a_row == settings.max_skipped_in_a_row:
                return False
            if self._due(settings.log_images) and window.steps:
                counts = {"skipped_steps": state.skipped_steps, "rollbacks": state.rollbacks}
                state.metrics = window.close() | {k: float(v) for k, v in counts.items()}
                state.metrics |= self._health()
                if isinstance(self.objective, FACM) and self._due(settings.health_images):
                    state.metrics |= self._look_closely(self.objective, batch, draws)
                window = MetricWindow()
                self._log(sender)
            ended = notices.time_is_up or notices.good_enough
            last = ended or state.images_seen == settings.total_images
            leaving = notices.look_around and not self._left and self.context.preempted()
            due = due or self._due(settings.checkpoint_images)
            # In mid-run, not of a state that may be about to be given up.
            if last or leaving or (finite and due):
                self._save(window)
                due = False
            if leaving:
                self._commit(window)
                self._left = True
                self._say(
                    f"{self.task.job}: a machine is to go; saved {state.images_seen:,} images"
                )
            if last:
                break
        return True

    def _save(self, window: MetricWindow) -> None:
        """Begin a checkpoint, once that before it is committed."""
        self._commit(window)
        self._moved("saving a checkpoint")
        with window.idle("checkpoint_share"):
            self.context.save_checkpoint(self._staged())
        self._saved = self.state.images_seen

    def _commit(self, window: MetricWindow) -> None:
        """Wait for the checkpoint that is on its way, if there is one."""
        if self._saved > self._committed:
            self._moved("waiting for a checkpoint")
            with window.idle("checkpoint_share"):
                self.context.commit_checkpoint()
            self._committed = self._saved

    def _enter_stage(self) -> None:
        """What is in force now, of what changes on the way."""
        stage = self.task.stage_at(self.state.images_seen)
        self.settings = stage.train
        if stage.objective != self._method:
            self.objective, self._method = (
                self.task.build_objective(stage.objective),
                stage.objective,
            )
            self._anchor = None

    def _next(self, batches: Iterator[Batch], window: MetricWindow) -> Batch | None:
        """None at the end."""
        self._moved("waiting for data")
        with window.idle("data_wait_share"):
            return next(batches, None)

    def _health(self) -> dict[str, float]:
        """A collective."""
        return {
            "update_to_weight": update_to_weight(self.state.optimizer),
            "memory_mib": peak_memory(self.context.device) / 2**20,
        }

    def _look_closely(self, facm: FACM, batch: Batch, draws: Draws) -> dict[str, float]:
        """What takes passes of its own. A collective."""
        context, state = self.context, self.state
        if self._anchor is None:
            rows = max(context.world_size, min(_ANCHOR_ROWS, self.settings.global_batch_size))
            rank, ranks = context.rank, context.world_size
            self._anchor = AnchorDrift(facm, self.task.stream, rows, rank, ranks, context.device)
        cosine = gradient_cosine(
            state.student, lambda task: self._gradients(batch, draws, task), facm
        )
        drift = self._anchor.measure(state.student, self.teacher)
        # No cosine where one task has no weight.
        return {"anchor_drift": drift} | ({} if cosine is None else {"gradient_cosine": cosine})

    def _moved(self, doing: str) -> None:
        self.context.moved(self.state.images_seen, doing)

    def _roll_back(self) -> None:
        """Back to the last checkpoint, to go on from there with other draws."""
        settings, seen = self.settings, self.state.images_seen
        rollbacks = self.state.rollbacks + 1
        if rollbacks > settings.max_rollbacks or not self._resume():
            raise Hopeless(
                FloatingPointError(
                    f"{settings.max_skipped_in_a_row} steps in a row were not finite, up to "
                    f"{seen:,} images. Their batches are in {self.task.skipped_uri}. Lower "
                    "train.learning_rate, look at the latent set, or allow train.max_rollbacks"
                )
            )
        self.state.rollbacks = rollbacks
        self._say(f"{self.task.job}: rolled back ({rollbacks} of {settings.max_rollbacks})")

    def _step(self, batch: Batch, draws: Draws, window: MetricWindow) -> tuple[bool, Notices]:
        """One optimizer step.

        Returns:
            False if it was skipped because something was not finite; and what rank 0 says.
        """
        state, batch_size = self.state, self.settings.global_batch_size
        metrics, rows = self._gradients(batch, draws, self.objective)
        if not self._checked:
            self._check_gradients()
        parameters = state.trained.parameters()
        norm = whole(clip_grad_norm_(parameters, self.settings.max_grad_norm)).detach()
        # All that ranks must know of each other, so that they decide alike, in one message.
        notices = self._notices() if self.context.rank == 0 else Notices()
        message = torch.stack([metrics["loss"], *metrics["loss"].new_tensor(notices)])
        loss, *flags = mean_over_workers(message).unbind()
        notices = Notices(*(bool(flag) for flag in flags))
        finite = bool(torch.isfinite(norm.to(loss.device)) & torch.isfinite(loss))
        state.images_seen += batch_size
        if finite:
            self._set_learning_rate()
            state.optimizer.step()
            state.ema.update(state.student, images_seen=state.images_seen, images_step=batch_size)
            window.add(metrics | {"loss": loss, "gradient_norm": norm}, batch_size)
            for some in rows:
                window.add_rows(some)
        else:
            state.skipped_steps += 1
            self._say(f"step skipped: loss {loss.item()}, gradient norm {norm.item()}")
            self._keep(batch, draws)
        return finite, notices

    def _notices(self) -> Notices:
        notices, validation = self._clock.notices(), self.task.validation
        if not notices.look_around or validation is None or validation.target_fid is None:
            return notices
        fid = self.context.best_fid()
        if fid > validation.target_fid:
            return notices
        self._say(f"{self.task.job}: a FID of {fid:.2f} is reached")
        return notices._replace(good_enough=True)

    def _check_gradients(self) -> None:
        """Once: ranks that reduce the same gradients must have got the same."""
        named = self.state.trained.named_parameters()
        differing = differing_replicas({n: p.grad for n, p in named if p.grad is not None})
        if differing:
            raise RuntimeError(f"the ranks {differing} got other gradients than their replicas")
        self._checked = True

    def _gradients(
        self, batch: Batch, draws: Draws, objective: Objective
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Leave the gradient of the batch's mean `objective` in the student.

        Returns:
            Loss and metrics, and values of the rows of each pass. The metrics' means over the
            workers, like the gradient that FSDP makes of theirs, are means over the whole batch.
        """
        device, world_size = self.context.device, self.context.world_size
        passes = self.settings.micro_batches(world_size)
        rows = self.settings.micro_batch_size or len(batch)
        self.state.optimizer.zero_grad()
        total: dict[str, torch.Tensor] = {}
        rows_of_passes: list[dict[str, torch.Tensor]] = []
        for index in range(passes):
            part = slice(index * rows, (index + 1) * rows)
            weight = len(batch[part]) * world_size / self.settings.global_batch_size
            if not weight:
                # Others have one row more. The pass is a collective: take part with any row.
                part = slice(1)
            some = batch[part].to(device)
            output = objective(
                self.state.student,
                some.latents,
                some.condition,
                self.teacher,
                **draws[part].to(device).given(),
                images_seen=self.state.images_seen,
            )
            (weight * output.loss).backward()
            if weight:
                rows_of_passes.append(output.rows)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                total[name] = total.get(name, 0) + weight * value
        return total, rows_of_passes

    def _keep(self, batch: Batch, draws: Draws) -> None:
        """Store this rank's rows of a skipped step, and what was drawn for them."""
        if self.state.skipped_steps > _KEPT_BATCHES:
            return
        condition = batch.condition
        tensors = {
            "latents": batch.latents,
            **(condition if isinstance(condition, Mapping) else {"label": condition}),
            **{f"draws.{name}": value for name, value in draws.given().items()},
        }
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        metadata = {"keys": json.dumps(batch.keys), "rollbacks": str(self.state.rollbacks)}
        name = f"images-{self.state.images_seen:012d}/rank-{self.context.rank}.safetensors"
        write_bytes(join(self.task.skipped_uri, name), save(tensors, metadata))

    def _draws(self, batch: Batch) -> Draws:
        """This rank's rows of the global batch's random draws."""
        seen, batch_size = self.state.images_seen, self.settings.global_batch_size
        shape = (batch_size, *batch.latents.shape[1:])
        generator = torch.Generator().manual_seed(
            step_seed(self.settings.seed, seen, self.state.rollbacks)
        )
        mine = dealt_to(self.context.rank, self.context.world_size, seen, batch_size)
        return self.objective.draw(shape, generator)[mine.start - seen :: mine.step]

    def _batches(self) -> Iterator[Batch]:
        """What is left of the run, this rank's share."""
        settings = self.settings
        if self.state.images_seen == settings.total_images:
            return iter(())
        return self.context.batches(
            self.task.stream,
            self.state.images_seen,
            settings.total_images,
            settings.global_batch_size,
        )

    def _set_learning_rate(self) -> None:
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.state.images_seen)

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
        self.context.publish(state.metrics)

    def _staged(self) -> StagedState:
        seen = self.state.images_seen
        artifact = replace(self.task.artifact, images_seen=seen)
        return self.state.staged(artifact, self.settings.keep_averages, self.task.lora)

    def _export(self) -> None:
        """Rank 0 writes the averaged weights as a model artefact into the run's folder."""
        artifact = replace(self.task.artifact, images_seen=self.state.images_seen)
        averages = self.state.ema.profiles[str(self.settings.export_sigma_rel)]
        weights = merged({**self.state.student.state_dict(), **averages}, self.task.lora)
        if self.context.rank != 0:
            for _ in weights:  # what rank 0 writes is gathered from all
                pass
            return
        with tempfile.TemporaryDirectory() as folder:
            write_artifact(Path(folder), weights, artifact)
            upload_artifact(Path(folder), self.task.artifact_uri)

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
