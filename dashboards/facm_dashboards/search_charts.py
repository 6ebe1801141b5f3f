"""The charts of a search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from facm_dashboards.charts import IMAGES, Axis, Chart, Point, Series
from facm_platform.search.findings import Findings
from facm_platform.search.records import FAILED, FINISHED, RUNNING, STOPPED, Record
from facm_platform.search.space import Dimension, parse
from facm_platform.search.trial import IMAGES as IMAGES_SEEN

_BINS = 6


def of_search(findings: Findings) -> list[Chart]:
    """All of them; what has nothing to show says why."""
    return [
        _confirmed(findings),
        _trials(findings),
        _heat(findings),
        _importance(findings),
        _parallel(findings),
        _pareto(findings),
    ]


def short(key: str) -> str:
    """The end of a dotted key, which tells enough."""
    where, _, name = key.rpartition(": ")
    told = ".".join(name.split(".")[-2:])
    return f"{told} ({where})" if where else told


def _confirmed(findings: Findings) -> Chart:
    """Mean and error of each candidate over its seeds."""
    metric, error = findings.config.objective, findings.config.error
    names, points = [], list[Point]()
    for place, one in enumerate(findings.candidates):
        names.append(f"trial {int(one.name)}" if one.is_trial else one.name)
        spread = one.error(metric, error)
        points.append((place, one.mean(metric), spread if math.isfinite(spread) else None))
    return Chart(
        key="confirmed",
        title="Confirmed on several seeds",
        x=Axis(labels=names),
        y=Axis(name=metric),
        series=[Series(name=metric, points=points, style="dots")],
        note="Mean ± standard error: the seeds' spread and the samples' error.",
        empty="The best trials are trained again on other seeds when all trials have ended.",
    )


def _trials(findings: Findings) -> Chart:
    metric, error = findings.config.objective, findings.config.error
    styles = {FINISHED: "line", STOPPED: "faint", FAILED: "faint", RUNNING: "line"}
    series = [
        Series(
            name=f"trial {one.number}",
            points=[(m[IMAGES_SEEN], m[metric], m[error]) for m in one.measured],
            style=styles[one.state],
        )
        for one in findings.trials
        if one.measured
    ]
    return Chart(
        key="trials",
        title="Trials while they train",
        x=IMAGES,
        y=Axis(name=metric, log=True),
        series=series,
        note="Faint: stopped early, because others were better.",
        empty="No trial was measured yet; the first measurement comes at stopping.first_images.",
    )


def _heat(findings: Findings) -> Chart:
    """The best trial by the first range, the anchor weight where it varies, and first choice."""
    space, metric = parse(findings.config.space), findings.config.objective
    ranges = [d for d in space.dimensions if d.drawn is None]
    ranges.sort(key=lambda dimension: not dimension.key.endswith("lambda_fm"))
    choices = {c.name: list(c.spaces) for c in space.alternatives}
    choices |= {d.name: [str(v) for v in d.drawn] for d in space.dimensions if d.drawn is not None}
    empty = "It needs a range and a choice, e.g. the anchor weight and the time distribution."
    if not ranges or not choices:
        return Chart(key="heat", title="Best distance by values", kind="heat", empty=empty)
    across, (down, labels) = ranges[0], next(iter(choices.items()))
    low, high = across.ends
    edges = np.geomspace(low, high, _BINS + 1) if low > 0 else np.linspace(low, high, _BINS + 1)
    cells: dict[tuple[int, int], float] = {}
    for one in (record for record in findings.trials if record.measured):
        row = labels.index(str(one.params[down]))
        column = int(np.searchsorted(edges, one.params[across.name], "right")) - 1
        place = (min(column, _BINS - 1), row)
        cells[place] = min(one.last[metric], cells.get(place, math.inf))
    return Chart(
        key="heat",
        title=f"{short(across.key)} × {short(down)}",
        kind="heat",
        x=Axis(
            name=short(across.key),
            labels=[f"{a:.2g}–{b:.2g}" for a, b in pairwise(edges)],
        ),
        y=Axis(labels=labels),
        value=Axis(name=metric, log=True),
        series=[Series(name=metric, points=[(x, y, v) for (x, y), v in cells.items()])],
        note="The best trial of each cell, at its last measurement; empty cells were not tried.",
        empty="No trial was measured yet.",
    )


def _parallel(findings: Findings) -> Chart:
    """A line for each measured trial through its values to its distance."""
    space, config = parse(findings.config.space), findings.config
    told = [record for record in findings.trials if record.measured]
    dimensions = [dimension for dimension, _ in space.all_dimensions()]
    axes = [_axis(dimension) for dimension in dimensions]
    axes += [Axis(name=short(c.name), labels=list(c.spaces)) for c in space.alternatives]
    names = [d.name for d in dimensions] + [c.name for c in space.alternatives]
    distances = [Axis(name=metric, log=True) for metric in config.objectives]

    def line(record: Record) -> Iterator[float | None]:
        for name, axis in zip(names, axes, strict=True):
            value = record.params.get(name)
            yield (
                list(axis.labels).index(str(value)) if axis.labels and value is not None else value
            )
        yield from (record.last[metric] for metric in config.objectives)

    return Chart(
        key="parallel",
        title="Values of the trials, and what came of them",
        kind="parallel",
        axes=[*axes, *distances],
        series=[
            Series(
                name="trials",
                points=[list(line(record)) for record in told],
                names=[f"trial {record.number}, {record.state}" for record in told],
            )
        ],
        note="Drag along an axis to keep the trials within; dark lines are the best.",
        empty="No trial was measured yet.",
    )


def _axis(dimension: Dimension) -> Axis:
    if dimension.drawn is not None:
        return Axis(name=short(dimension.name), labels=[str(v) for v in dimension.drawn])
    low, high = dimension.ends
    return Axis(name=short(dimension.name), log=dimension.log, low=low, high=high)


def _importance(findings: Findings) -> Chart:
    found = findings.importances()
    order = sorted(found, key=lambda name: found[name])
    return Chart(
        key="importance",
        title="What mattered",
        kind="bars",
        x=Axis(name="share of the spread", form="percent", low=0),
        y=Axis(labels=[short(name) for name in order]),
        series=[Series(name="importance", points=[(found[n], k) for k, n in enumerate(order)])],
        note="By PED-ANOVA, of the values that all finished trials have.",
        empty="It takes four finished trials.",
    )


def _pareto(findings: Findings) -> Chart:
    chart = Chart(
        key="pareto",
        title="Pareto front",
        empty="This search has one objective. With two, e.g. objectives=[fid_nfe1,fid_nfe2], here "
        "are the trials than which no other is better in both.",
    )
    if len(findings.config.objectives) < 2:
        return chart
    across, up = findings.config.objectives
    front = sorted(findings.front(), key=lambda record: record.last[across])
    rest = [one for one in findings.trials if one.finished and one not in front]
    series = [
        Series(
            name=name,
            points=[(one.last[across], one.last[up]) for one in some],
            style=style,
            names=[f"trial {one.number}" for one in some],
        )
        for name, some, style in (("front", front, "best"), ("other trials", rest, "dots"))
        if some
    ]
    return Chart(
        key="pareto",
        title="Pareto front",
        x=Axis(name=across),
        y=Axis(name=up),
        series=series,
        empty="No trial has finished yet.",
    )
