"""Functions that processes of `run_tasks` call; what this module imports, each of them imports."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

from puma.errors import DataError


def square(x: int) -> int:
    return x * x


def place(x: int) -> tuple[int, str | None, str | None, str]:
    return os.getpid(), os.environ.get("RANK"), os.environ["OMP_NUM_THREADS"], sys.path[0]


def gpu(x: int) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def gpu_memory(x: int) -> int:
    """What a training here may plan with on a GPU of twelve bytes, all of them free."""
    import torch

    from puma.training.run import free_memory

    torch.cuda.mem_get_info = lambda device=None: (12, 12)
    return free_memory(torch.device("cuda"))


def refuse(x: int) -> int:
    raise DataError(f"item {x} is broken", why="a reason", fix="a command")


def fail(x: int) -> int:
    raise KeyError(x)


def die(x: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def write(x: int) -> int:
    print(f"step {x}", file=sys.stderr, flush=True)
    return x


def warn(x: int) -> int:
    logging.getLogger("puma").warning("class \x1b[31m%d", x)
    return x


def sleep(folder: str, x: int) -> int:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)
    return x


def lost_slowly(x: int) -> int:
    """Rank 1 misses rank 0 before that has ended, as when the system takes its time to end a killed process."""
    if x == 1:
        raise RuntimeError("connection reset by peer")
    time.sleep(0.4)
    return die(x)


def stubborn(folder: str, x: int) -> int:
    if x == 0:
        while not list(Path(folder).glob("*.pid")):
            time.sleep(0.02)
        return die(x)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return sleep(folder, x)
