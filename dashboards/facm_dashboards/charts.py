"""Charts as data: what is drawn, of which axes; the browser only draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from facm_platform.tracking.reading import Curve

Kind = Literal["lines", "heat", "bars", "parallel"]
Point = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Of a chart.

    Attributes:
        name: With its unit.
        log: Whether it is logarithmic.
        labels: Of its places, where they are no numbers.
        low: Where it begins; None where the data do.
        high: Where it ends.
        form: How numbers are written: ``images``, ``percent``, ``bytes`` or plain.
    """

    name: str = ""
    log: bool = False
    labels: Sequence[str] = ()
    low: float | None = None
    high: float | None = None
    form: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Of a chart.

    Attributes:
        name: In the legend.
        points: (x, y), or (x, y, error); of a heat map (column, row, value).
        style: ``line``, ``dots`` (no line), ``faint`` or ``best``.
        names: Of the points, where they have some.
        colour: Its number among the colours; None for that of its place.
    """

    name: str
    points: Sequence[Point]
    style: str = "line"
    names: Sequence[str] = ()
    colour: int | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure.

    Attributes:
        key: Its name in addresses and files.
        title: Above it.
        kind: How it is drawn.
        x: Axis, across.
        y: Axis, upwards; of a heat map's rows.
        series: What is drawn.
        note: What it tells, in a sentence.
        empty: What to do about it when there is nothing to draw.
        axes: Of parallel coordinates, in place of x and y.
        value: Axis of a heat map's colours.
        linked: Charts of one page whose pointers move together.
    """

    key: str
    title: str
    kind: Kind = "lines"
    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    series: Sequence[Series] = ()
    note: str = ""
    empty: str = ""
    axes: Sequence[Axis] = ()
    value: Axis = field(default_factory=Axis)
    linked: bool = False

    @property
    def has_data(self) -> bool:
        """Whether there is something to draw."""
        return any(series.points for series in self.series)


IMAGES = Axis(name="images seen", form="images")


def points_of(curve: Curve, error: Curve | None = None) -> list[Point]:
    """Of a curve; the error of each count of images that has one."""
    if error is None:
        return [(int(x), _finite(y)) for x, y in zip(curve.images, curve.values, strict=True)]
    errors = dict(zip(error.images.tolist(), error.values.tolist(), strict=True))
    return [
        (int(x), _finite(y), _finite(errors.get(int(x), math.nan)))
        for x, y in zip(curve.images, curve.values, strict=True)
    ]


def as_json(thing: Any) -> Any:
    """Plain data of dataclasses, without what JSON lacks."""
    if hasattr(thing, "__dataclass_fields__"):
        return {name: as_json(getattr(thing, name)) for name in thing.__dataclass_fields__}
    if isinstance(thing, float):
        return _finite(thing)
    if isinstance(thing, (str, int, type(None))):
        return thing
    if isinstance(thing, dict):
        return {str(key): as_json(value) for key, value in thing.items()}
    return [as_json(one) for one in thing]


def drawn(charts: Iterable[Chart]) -> list[Any]:
    """As the browser takes them."""
    return [as_json(chart) for chart in charts]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
