"""A process's own memory, and how much it was at most."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path


class Peak:
    """The largest `anonymous_bytes` of every millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    def _watch(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.001)


def return_freed_memory() -> None:
    """To the machine, and at once: the C library would keep more the more it has seen freed."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)


def anonymous_bytes() -> int:
    """Of this process's memory, what is no file's: pages of a mapped file can be dropped."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
