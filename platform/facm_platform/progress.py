"""How long it still takes, for lines on the terminal."""

from __future__ import annotations


def time_left(done: float, total: float, per_second: float) -> str:
    """``1h02m left``, ``2m05s left``: for what of `total` is not done yet."""
    minutes, seconds = divmod(round((total - done) / per_second), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    text = f"{hours}h{minutes_of_hour:02d}m" if hours else f"{minutes}m{seconds:02d}s"
    return f"{text} left"
