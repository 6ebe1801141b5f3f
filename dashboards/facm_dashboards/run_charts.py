"""The charts of one run, and of some beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from facm_dashboards.charts import IMAGES, Axis, Chart, Point, Series, points_of
from facm_dashboards.data import Data
from facm_dashboards.runs import Fids, own_fids
from facm_platform.tracking.reading import Curve, RunRecord
from facm_platform.training.progress import TIME_BINS

Curves = Mapping[str, Sequence[Curve | None]]

_BINS = [f"{k / TIME_BINS:.3g}–{(k + 1) / TIME_BINS:.3g}" for k in range(TIME_BINS)]
_TASKS = {"loss_fm": "FM", "loss_cm": "CM", "loss_mse": "flow-matching"}
_COLUMNS = 200


@dataclass(frozen=True, kw_only=True)
class _Lines:
    """A chart of some metrics over training.

    Attributes:
        key: Its name.
        title: Above it.
        metrics: Name -> what it is called in the legend.
        axis: Upwards.
        note: What it tells.
        empty: What to do when nothing was logged.
    """

    key: str
    title: str
    metrics: Mapping[str, str]
    axis: Axis
    note: str = ""
    empty: str = "Nothing was logged: it comes with the next log point (train.log_images)."


_OF_FACM = "This run has logged none: it is a number of FACM's, at every log point."
_RARE = (
    "This run has logged none. It is taken every train.health_images images; lower that to see "
    "more of it."
)
LINES = (
    _Lines(
        key="losses",
        title="Losses",
        metrics={
            "loss": "loss",
            "loss_fm": "FM (anchor)",
            "loss_cm": "CM (shortcut)",
            "loss_mse": "mean square",
            "loss_cosine": "cosine",
        },
        axis=Axis(name="loss", log=True),
    ),
    _Lines(
        key="tangent",
        title="Tangent norm",
        metrics={"tangent_rms": "tangent RMS"},
        axis=Axis(name="RMS"),
        note="Of the shortcut's tangent, before it is clipped.",
        empty=_OF_FACM,
    ),
    _Lines(
        key="clipped",
        title="Clipped share",
        metrics={"clipped_share": "clipped"},
        axis=Axis(name="share of entries", form="percent", low=0),
        note="Entries of the tangent that reach the clip; much of it means a target that is bent.",
        empty=_OF_FACM,
    ),
    _Lines(
        key="cosine",
        title="Gradient cosine",
        metrics={"gradient_cosine": "cosine"},
        axis=Axis(name="cosine", low=-1, high=1),
        note="Between the gradients of the two tasks; below zero they pull against each other.",
        empty=_RARE,
    ),
    _Lines(
        key="anchor",
        title="Anchor drift",
        metrics={"anchor_drift": "drift"},
        axis=Axis(name="‖F − v‖ / ‖v‖", low=0),
        note="How far the velocity at the anchor is from its target, on rows that stay the same.",
        empty=_RARE,
    ),
    _Lines(
        key="gradient",
        title="Gradient norm and update",
        metrics={"gradient_norm": "gradient norm", "update_to_weight": "‖Δθ‖ / ‖θ‖"},
        axis=Axis(name="", log=True),
    ),
    _Lines(
        key="speed",
        title="Throughput",
        metrics={"images_per_second": "images/s"},
        axis=Axis(name="images/s", low=0),
    ),
    _Lines(
        key="idle",
        title="Time without work",
        metrics={"data_wait_share": "waiting for data", "checkpoint_share": "checkpoints"},
        axis=Axis(name="share of time", form="percent", low=0),
    ),
    _Lines(
        key="memory",
        title="Memory of the fullest worker",
        metrics={"memory_mib": "memory"},
        axis=Axis(name="MiB", low=0),
    ),
    _Lines(
        key="skipped",
        title="Skipped steps and rollbacks",
        metrics={"skipped_steps": "skipped steps", "rollbacks": "rollbacks"},
        axis=Axis(name="count", low=0),
        note="A step whose loss or gradient is not finite is skipped.",
    ),
)
_COMPARED = ("tangent", "clipped", "cosine", "anchor", "speed")


def of_run(data: Data, run: RunRecord) -> list[Chart]:
    """All charts of a run."""
    names = [name for name in run.metrics if not name.startswith("teacher_")]
    curves = data.curves([run], names)
    return [
        *(_heat(task, words, curves) for task, words in _TASKS.items() if task in run.metrics),
        _fids(run, curves),
        *(_lines(lines, curves) for lines in LINES),
    ]


def of_comparison(data: Data, runs: Sequence[RunRecord], fids: Fids) -> list[Chart]:
    """All charts of some runs beside each other."""
    lines = [one for one in LINES if one.key in _COMPARED]
    metrics = ["loss", "loss_fm", "loss_cm", "fid_nfe1", "fid_nfe1_error"]
    metrics += [name for one in lines for name in one.metrics]
    curves = data.curves(runs, metrics)
    charts = [_fid_by_steps(runs, fids), _fid_by_images(runs, curves)]
    for metric, title in (("loss", "Loss"), ("loss_fm", "FM loss"), ("loss_cm", "CM loss")):
        axis = Axis(name=title.lower() if metric == "loss" else title, log=True)
        charts.append(_across(metric, title, metric, axis, "", runs, curves))
    for one in lines:
        (metric,) = one.metrics
        charts.append(_across(one.key, one.title, metric, one.axis, one.note, runs, curves))
    return charts


def _fids(run: RunRecord, curves: Curves) -> Chart:
    """Over training, at each number of steps."""
    series = []
    for steps in own_fids(run):
        curve, error = _one(curves, f"fid_nfe{steps}"), _one(curves, f"fid_nfe{steps}_error")
        if curve is not None:
            name = f"{steps} step" if steps == 1 else f"{steps} steps"
            series.append(Series(name=name, points=points_of(curve, error)))
    return Chart(
        key="fid",
        title="FID while it trains",
        x=IMAGES,
        y=Axis(name="FID", log=True),
        series=series,
        note="Of every checkpoint, ± its standard error.",
        empty="No checkpoint was measured. Give validation.features_uri (and "
        "validation.nfe=[1,2,4]) to jobs/distill.py, or measure the student with jobs/evaluate.py.",
        linked=True,
    )


def _heat(task: str, words: str, curves: Curves) -> Chart:
    """The loss by time, over training."""
    found = [_one(curves, f"{task}/t{index}") for index in range(TIME_BINS)]
    columns = sorted({int(x) for curve in found if curve is not None for x in curve.images})
    # As many as can be told apart.
    columns = columns[:: -(-len(columns) // _COLUMNS) or 1]
    place = {images: column for column, images in enumerate(columns)}
    points: list[Point] = []
    for row, curve in enumerate(found):
        if curve is not None:
            points += [
                (place[int(x)], row, float(y))
                for x, y in zip(curve.images, curve.values, strict=True)
                if int(x) in place and math.isfinite(y)
            ]
    return Chart(
        key=f"{task}-by-time",
        title=f"{words} loss by time",
        kind="heat",
        x=Axis(name="images seen", labels=[f"{images}" for images in columns], form="images"),
        y=Axis(name="t (0 is noise)", labels=_BINS),
        value=Axis(name="loss", log=True),
        series=[Series(name=task, points=points)],
        note="Each row is an eighth of the way from noise to data.",
        empty="Nothing was logged by time: it comes with the next log point.",
    )


def _lines(lines: _Lines, curves: Curves) -> Chart:
    series = []
    for metric, name in lines.metrics.items():
        curve = _one(curves, metric)
        if curve is not None:
            series.append(Series(name=name, points=points_of(curve)))
    return Chart(
        key=lines.key,
        title=lines.title,
        x=IMAGES,
        y=lines.axis,
        series=series,
        note=lines.note,
        empty=lines.empty,
        linked=True,
    )


def _fid_by_steps(runs: Sequence[RunRecord], fids: Fids) -> Chart:
    found = [fids.of(run) for run in runs]
    steps = sorted({steps for by_steps in found for steps in by_steps})
    series = [
        Series(
            name=run.name,
            colour=place,
            points=[(steps.index(nfe), fid.value, fid.error) for nfe, fid in by_steps.items()],
        )
        for place, (run, by_steps) in enumerate(zip(runs, found, strict=True))
    ]
    protocols = {fid.protocol for by_steps in found for fid in by_steps.values()}
    note = f"± standard error. Protocol: {'; '.join(sorted(protocols))}."
    if len(protocols) > 1:
        note = f"{note} Numbers of different protocols do not compare."
    return Chart(
        key="fid-nfe",
        title="FID against steps",
        x=Axis(name="steps (NFE)", labels=[str(one) for one in steps]),
        y=Axis(name="FID", log=True),
        series=[one for one in series if one.points],
        note=note if protocols else "",
        empty="None of these runs was measured. Measure them with jobs/evaluate.py.",
    )


def _fid_by_images(runs: Sequence[RunRecord], curves: Curves) -> Chart:
    series = []
    together = zip(runs, curves["fid_nfe1"], curves["fid_nfe1_error"], strict=True)
    for place, (run, curve, error) in enumerate(together):
        if curve is not None:
            points = points_of(curve, error)
            series.append(Series(name=run.name, points=points, colour=place))
    return Chart(
        key="fid-images",
        title="FID at one step against images",
        x=IMAGES,
        y=Axis(name="FID", log=True),
        series=series,
        empty="None of these runs has measured its checkpoints: give jobs/distill.py validation.*.",
        linked=True,
    )


def _across(
    key: str,
    title: str,
    metric: str,
    axis: Axis,
    note: str,
    runs: Sequence[RunRecord],
    curves: Curves,
) -> Chart:
    series = [
        Series(name=run.name, points=points_of(curve), colour=place)
        for place, (run, curve) in enumerate(zip(runs, curves[metric], strict=True))
        if curve is not None
    ]
    empty = f"None of these runs has logged {metric}."
    return Chart(
        key=key, title=title, x=IMAGES, y=axis, series=series, note=note, empty=empty, linked=True
    )


def _one(curves: Curves, metric: str) -> Curve | None:
    found: Iterator[Curve | None] = iter(curves.get(metric, ()))
    return next(found, None)
