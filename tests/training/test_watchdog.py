"""A rank that hangs is named by those who wait for it; on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.core.ranks import ROOT

RANKS = 2
TIMEOUT = 60


def told(case: str) -> list[tuple[int, str]]:
    """Exit status of each rank, and what it said; one that is stopped is killed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    script, port = Path(__file__).with_name("watchdog_ranks.py"), str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), case, port, str(rank), str(RANKS)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    stopped = [rank for rank in range(RANKS) if case == f"stops-{rank}"]
    try:
        for rank, process in enumerate(processes):
            if rank not in stopped:
                process.wait(TIMEOUT)
    finally:
        for process in processes:
            process.kill()
    said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize(("case", "behind"), [("sleeps", 1), ("stops-1", 1), ("stops-0", 0)])
def test_the_rank_that_hangs_is_named(case: str, behind: int) -> None:
    for rank, (status, said) in enumerate(told(case)):
        if case.startswith("stops") and rank == behind:
            continue
        assert status == 1
        assert f"rank {rank} has been in a step for 3 s after 480 images" in said
        assert f"behind are the ranks [{behind}]" in said, said
        assert "most recent call first" in said


def test_who_is_done_is_left_alone() -> None:
    for status, said in told("nothing"):
        assert status == 0, said
