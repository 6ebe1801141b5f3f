"""What ends a run that hangs: a collective waits, without a word, for a rank that is stuck.

Each rank notes in the process group's store that it lives, and where it is. One that has not moved
for too long looks where the others are, says which of them are behind, and exits, so that the run
begins again from its last checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

import torch.distributed as dist

_ANSWER_SECONDS = 10
_BEAT_SECONDS = 1.0
# A rank whose heart has not beaten for so many beats is stuck as a whole.
_BEATS = 3


class _Place(NamedTuple):
    """Where a rank is. Of two, the one with fewer images or fewer collectives is behind."""

    images_seen: int
    collectives: int
    doing: str
    beat: int

    def __str__(self) -> str:
        where = f"{self.doing} after {self.images_seen:,} images"
        return f"{where} and {self.collectives:,} collectives"


class Watchdog:
    """One rank's. To be made by all of them, once the process group is up.

    Args:
        seconds: After which a rank that has not moved gives up.
    """

    def __init__(self, seconds: float) -> None:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._seconds = seconds
        # Of its own connection: training uses the other one.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._closed = threading.Event()
        self.moved(-1, "starting")
        for work in (self._live, self._watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def moved(self, images_seen: int, doing: str) -> None:
        """This rank gets on: it does this now, after so many images."""
        self._images_seen, self._doing = images_seen, doing
        self._since = time.monotonic()

    def close(self) -> None:
        """This rank is done."""
        self._closed.set()

    def _live(self) -> None:
        for beat in count():
            place = _Place(self._images_seen, _collectives(), self._doing, beat)
            # Where the store is gone, rank 0 is: the verdict says so.
            with suppress(dist.DistError):
                self._store.set(f"watchdog/{self._rank}", json.dumps(place))
            if self._closed.wait(_BEAT_SECONDS):
                return

    def _watch(self) -> None:
        while (left := self._since + self._seconds - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        print(self._verdict(), file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        # Not at once: others are about to look for this rank's sign of life.
        time.sleep(2 * _BEATS * _BEAT_SECONDS)
        os._exit(1)

    def _verdict(self) -> str:
        behind, where = self._behind()
        they = f"behind are the ranks {behind}" if behind else "so are all others"
        return (
            f"rank {self._rank} has been {self._doing} for {self._seconds:.0f} s after "
            f"{self._images_seen:,} images; {they}. {where}. This rank ends, and the run begins "
            "again from its last checkpoint. If nothing hangs, allow more by workers.stall_seconds"
        )

    def _behind(self) -> tuple[list[int], str]:
        """Ranks that the others wait for, and where each is."""
        # In a thread, because the store's own time limit is none where rank 0 is stopped.
        thread = ThreadPoolExecutor(1)
        try:
            earlier = thread.submit(self._places).result(_ANSWER_SECONDS)
            time.sleep(_BEATS * _BEAT_SECONDS)
            places = thread.submit(self._places).result(_ANSWER_SECONDS)
        except (dist.DistError, TimeoutError):
            return [0], "Rank 0, which knows where each is, does not answer"
        silent = [rank for rank, place in enumerate(places) if place == earlier[rank]]
        first, last = (end(place[:2] for place in places) for end in (min, max))
        slow = [rank for rank, place in enumerate(places) if place[:2] == first != last]
        where = "; ".join(f"{rank} {place}" for rank, place in enumerate(places))
        signs = f"; no sign of life from {silent}" if silent else ""
        return silent or slow, f"Where each is: {where}{signs}"

    def _places(self) -> list[_Place]:
        found = (self._store.get(f"watchdog/{rank}") for rank in range(self._ranks))
        return [_Place(*json.loads(place)) for place in found]


def _collectives() -> int:
    """How many this rank has begun, in all its groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
