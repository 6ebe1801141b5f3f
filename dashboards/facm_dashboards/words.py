"""Numbers and times as the pages write them."""

from __future__ import annotations

import math
import time

from facm_dashboards.runs import Fid


def number(value: float | None, digits: int = 4) -> str:
    """Four significant digits; a dash for none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def count(value: float | None) -> str:
    """Thousands apart; a dash for none."""
    return "–" if value is None else f"{value:,.0f}"


def distance(fid: Fid | None) -> str:
    """``16.69 ± 0.78``."""
    if fid is None:
        return "–"
    told = f"{fid.value:.2f}"
    return told if fid.error is None else f"{told} ± {fid.error:.2f}"


def span(seconds: float) -> str:
    """``3 h 12 min``, in the two largest units."""
    left = round(seconds)
    told: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        whole, left = divmod(left, size)
        if whole or told or unit == "s":
            told.append(f"{whole} {unit}")
    return " ".join(told[:2])


def age(milliseconds: float) -> str:
    """How long ago that was, in the largest unit."""
    told = span(max(0.0, time.time() - milliseconds / 1000))
    return " ".join(told.split(" ")[:2]) + " ago"


def clock(seconds: float) -> str:
    """``21:04:09``, of this machine."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def moment(milliseconds: float) -> str:
    """``2026-01-31 21:04``, of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))
