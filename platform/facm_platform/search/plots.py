"""The pictures of a search."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from facm_platform.search.findings import Findings
from facm_platform.search.records import Record
from facm_platform.search.space import Dimension, parse
from facm_platform.search.trial import IMAGES

_COLOURS = {"finished": "#1b6ca8", "stopped": "#c9c9c9", "failed": "#c0392b", "running": "#999999"}
_BINS = 6


def draw_plots(findings: Findings) -> dict[str, bytes]:
    """PNG files by name; those that have something to show."""
    plots: dict[str, Callable[[Findings], Figure | None]] = {
        "confirmed.png": _confirmed,
        "trials.png": _trials,
        "heatmap.png": _heat_map,
        "parallel.png": _parallel,
        "importance.png": _importance,
        "pareto.png": _pareto,
    }
    drawn = {name: draw(findings) for name, draw in plots.items()}
    return {name: _png(figure) for name, figure in drawn.items() if figure is not None}


def _confirmed(findings: Findings) -> Figure:
    """Mean and standard error of each candidate, and its seeds."""
    metric, error = findings.config.objective, findings.config.error
    figure, axes = _figure(7, 0.5 * len(findings.candidates) + 1.4)
    names = []
    for row, one in enumerate(findings.candidates):
        names.append(f"trial {int(one.name)}" if one.is_trial else one.name)
        found = one.distances(metric)
        if not found:
            continue
        colour = "#d35400" if one is findings.winner else "#1b6ca8"
        spread = one.error(metric, error)
        axes.errorbar(one.mean(metric), row, xerr=spread, fmt="D", color=colour, capsize=4)
        axes.plot(found, [row] * len(found), "o", color=colour, alpha=0.35)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}, mean ± standard error; dots are seeds")
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    return figure


def _trials(findings: Findings) -> Figure:
    """Distance of every trial while it trained."""
    metric, error = findings.config.objective, findings.config.error
    figure, axes = _figure(7, 4.2)
    for record in findings.trials:
        images = [one[IMAGES] for one in record.measured]
        distances = [one[metric] for one in record.measured]
        errors = [one[error] for one in record.measured]
        colour = _COLOURS[record.state]
        axes.errorbar(images, distances, errors, color=colour, marker="o", capsize=2, lw=1)
    for state, colour in _COLOURS.items():
        if any(record.state == state for record in findings.trials):
            axes.plot([], [], color=colour, marker="o", label=state)
    axes.legend(frameon=False)
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("images seen")
    axes.set_ylabel(metric)
    return figure


def _heat_map(findings: Findings) -> Figure | None:
    """The best trial by the first range (of the anchor weight, where it varies) and first choice.

    On the left after the first measurement, which all trials have; on the right at their end.
    """
    space = parse(findings.config.space)
    ranges = [d for d in space.dimensions if d.drawn is None]
    ranges.sort(key=lambda dimension: not dimension.key.endswith("lambda_fm"))
    choices = {c.name: list(c.spaces) for c in space.alternatives}
    choices |= {d.name: list(d.drawn) for d in space.dimensions if d.drawn is not None}
    if not ranges or not choices:
        return None
    across, (down, labels) = ranges[0], next(iter(choices.items()))
    figure = Figure(figsize=(9, 0.5 * len(labels) + 2.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    metric = findings.config.objective
    first = [(record, record.measured[0][metric]) for record in findings.trials if record.measured]
    last = [(record, record.last[metric]) for record in findings.trials if record.finished]
    low, high = across.ends
    edges = np.geomspace(low, high, _BINS + 1) if low > 0 else np.linspace(low, high, _BINS + 1)
    titles = ("first measurement", "at the end")
    for axes, title, told in zip(panels, titles, (first, last), strict=True):
        cells = np.full((len(labels), _BINS), np.nan)
        for record, distance in told:
            row = labels.index(record.params[down])
            column = min(
                int(np.searchsorted(edges, record.values[across.key], "right")) - 1, _BINS - 1
            )
            cells[row, column] = np.nanmin([cells[row, column], distance])
        image = axes.imshow(cells, cmap="viridis_r", aspect="auto")
        for (row, column), distance in np.ndenumerate(cells):
            if np.isfinite(distance):
                box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
                axes.text(
                    column, row, f"{distance:.3g}", ha="center", va="center", fontsize=8, bbox=box
                )
        axes.set_xticks(np.arange(_BINS + 1) - 0.5, [f"{edge:.2g}" for edge in edges], fontsize=8)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(across.key)
        axes.set_title(f"best {metric}, {title}", fontsize=10)
        if told:
            figure.colorbar(image, ax=axes)
    return figure


def _parallel(findings: Findings) -> Figure | None:
    """A line for each measured trial through its values to its distance, dark for the best."""
    metric = findings.config.objective
    told = [record for record in findings.trials if record.measured]
    space = parse(findings.config.space)
    if not told:
        return None
    scales = [_Scale.of(dimension) for dimension, _ in space.all_dimensions()]
    scales += [_Scale(c.name, c.name, tuple(c.spaces), False) for c in space.alternatives]
    figure, axes = _figure(max(7.0, 1.5 * (len(scales) + 1)), 4.2)
    distances = np.array([record.last[metric] for record in told])
    spread = np.log(distances / distances.min())
    heights = spread / max(spread.max(), 1e-12)
    for index in np.argsort(-distances):
        record = told[index]
        places = np.array([*(scale.place(record) for scale in scales), heights[index]])
        has = np.flatnonzero(np.isfinite(places))
        colour = _COLOURS["stopped"] if not record.finished else str(0.75 * heights[index])
        axes.plot(has, places[has], color=colour, marker=".", lw=1.2)
    names = [scale.title() for scale in scales] + [
        f"{metric}\n{distances.min():.3g} (0) to {distances.max():.3g} (1)"
    ]
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_yticks([])
    axes.set_title(
        "trials (light: stopped early); a line has no dot where its trial has no such value",
        fontsize=9,
    )
    return figure


class _Scale:
    """An axis of the parallel coordinates, from 0 to 1."""

    def __init__(self, name: str, key: str, values: Sequence[object], log: bool) -> None:
        self._name, self._key, self._values, self._log = name, key, values, log

    @classmethod
    def of(cls, dimension: Dimension) -> _Scale:
        return cls(dimension.name, dimension.key, dimension.ends, dimension.log)

    def place(self, record: Record) -> float:
        if self._name not in record.params:
            return float("nan")
        given = record.params[self._name]
        if isinstance(given, str):
            labels = [str(value) for value in self._values]
            return labels.index(given) / max(1, len(labels) - 1)
        low, high = float(str(self._values[0])), float(str(self._values[-1]))
        if self._log:
            low, high, given = np.log(low), np.log(high), np.log(given)
        return float((given - low) / (high - low))

    def title(self) -> str:
        ends = [f"{v:g}" if isinstance(v, float) else str(v) for v in self._values]
        where, _, key = self._name.rpartition(": ")
        short = ".".join(key.split(".")[-2:])
        return f"{where}\n{short}\n{ends[0]} to {ends[-1]}"


def _importance(findings: Findings) -> Figure | None:
    found = findings.importances()
    if not found:
        return None
    figure, axes = _figure(7, 0.4 * len(found) + 1.2)
    axes.barh(list(found), list(found.values()), color="#1b6ca8")
    axes.invert_yaxis()
    axes.set_xlabel("importance, of what the finished trials have in common")
    return figure


def _pareto(findings: Findings) -> Figure | None:
    objectives = findings.config.objectives
    if len(objectives) == 1:
        return None
    figure, axes = _figure(5.5, 4.5)
    finished = [record for record in findings.trials if record.finished]
    front = sorted(findings.front(), key=lambda record: record.last[objectives[0]])
    for records, style in ((finished, "o"), (front, "o-")):
        points = np.array([[record.last[name] for name in objectives] for record in records])
        axes.plot(points[:, 0], points[:, 1], style)
    for record in front:
        place = (record.last[objectives[0]], record.last[objectives[1]])
        axes.annotate(str(record.number), place, textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel(objectives[0])
    axes.set_ylabel(objectives[1])
    axes.set_title("finished trials, and the Pareto front")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain_numbers(axis: Axis) -> None:
    """20 and 30, not powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
    axis.set_minor_locator(LogLocator(subs=(2, 3, 5)))


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
