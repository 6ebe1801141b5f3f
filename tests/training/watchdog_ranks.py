"""A rank's part of `test_watchdog.py`: ``python SCRIPT CASE PORT RANK WORLD_SIZE``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from facm_platform.training import watchdog as module

if __name__ == "__main__":
    module._BEAT_SECONDS, module._ANSWER_SECONDS = 0.5, 3
    case, port, rank, world_size = sys.argv[1], *map(int, sys.argv[2:])
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    dist.all_reduce(torch.zeros(1))
    watchdog = module.Watchdog(3.0)
    watchdog.moved(480, "in a step")
    if case == "sleeps" and rank == 1:
        threading.Event().wait()
    if case == f"stops-{rank}":
        time.sleep(1)  # until all have told where they are
        os.kill(os.getpid(), signal.SIGSTOP)
    if case == "nothing":
        watchdog.close()
        time.sleep(4)
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()
