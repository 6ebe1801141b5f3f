"""What ends a run that hangs: a collective waits, without a word, for a rank that is stuck.

Each rank notes in the process group's store where it is. One that has not moved for too long looks
where the others are, says which of them are behind, and exits, so that the run begins again from
its last checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

_ANSWER_SECONDS = 10


class Watchdog:
    """One rank's. To be made by all of them, once the process group is up.

    Args:
        seconds: After which a rank that has not moved gives up.
    """

    def __init__(self, seconds: float) -> None:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._seconds = seconds
        store = dist.distributed_c10d._get_default_store()
        self._store, self._theirs = store, store.clone()
        self._theirs.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
        self._closed = threading.Event()
        self._place = (-1, "starting")
        self.moved(*self._place)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def moved(self, images_seen: int, doing: str) -> None:
        """This rank gets on: it does this now, after so many images."""
        self._place, self._since = (images_seen, doing), time.monotonic()
        self._store.set(f"watchdog/{self._rank}", f"{images_seen} {doing}")

    def close(self) -> None:
        """This rank is done."""
        self._closed.set()

    def _watch(self) -> None:
        while (left := self._since + self._seconds - time.monotonic()) > 0:
            if self._closed.wait(left):
                return
        print(self._verdict(), file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)

    def _verdict(self) -> str:
        images_seen, doing = self._place
        places = {rank: self._place_of(rank) for rank in range(self._ranks)}
        behind = [rank for rank, place in places.items() if place is None]
        if not behind:
            first = min(place for place in places.values() if place)
            if any(place != first for place in places.values()):
                behind = [rank for rank, place in places.items() if place == first]
        they = f"behind are the ranks {behind}" if behind else "so are all others"
        where = ", ".join(f"{rank}: {place}" for rank, place in places.items())
        return (
            f"rank {self._rank} has been {doing} for {self._seconds:.0f} s after {images_seen:,} "
            f"images; {they}. Where each is: {where}. This rank ends, and the run begins again "
            "from its last checkpoint. If nothing hangs, allow more by workers.stall_seconds"
        )

    def _place_of(self, rank: int) -> tuple[int, str] | None:
        """None if it cannot be learned: the process that keeps the store, rank 0, is stuck."""
        if rank == self._rank:
            return self._place
        try:
            images_seen, doing = self._theirs.get(f"watchdog/{rank}").decode().split(" ", 1)
        except dist.DistError:
            return None if rank == 0 else (sys.maxsize, "unknown")
        return int(images_seen), doing
