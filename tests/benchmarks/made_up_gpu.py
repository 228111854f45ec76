"""benchmarks/gpu.py with made-up stages: rows that fail, end their process, leave the device broken, or hang."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import torch


def right(stage: gpu.Stage) -> None:
    def once() -> dict[str, Any]:
        with (stage.out / "measured.txt").open("a") as file:
            file.write("first\n")
        return {"n": 1}

    def breaks_the_device() -> dict[str, Any]:
        stage.cuda = True  # there is none: whatever is asked of it from now on fails
        raise RuntimeError("an illegal memory access was encountered")

    def absent() -> dict[str, Any]:
        import no_such_package  # type: ignore[import-not-found]

        return {"n": no_such_package.n}

    stage.row("first", once)
    stage.row("killed", lambda: {"n": os.kill(os.getpid(), signal.SIGKILL)})
    stage.row("broken", breaks_the_device)
    stage.row("absent", absent)
    stage.row("NaN", lambda: gpu.agree(torch.tensor([0.0, torch.nan]), torch.tensor([0.0, 1.0]), 1e-3))
    stage.row(
        "both NaN", lambda: gpu.agree(torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf]), 0)
    )
    stage.row("too long", lambda: {"n": 5}, needs=1e6)
    stage.row("last", lambda: {"n": 2})


def margins(stage: gpu.Stage) -> None:
    def long() -> dict[str, Any]:
        began = stage.out / "long.pid"
        if not began.exists():
            began.write_text(str(os.getpid()))
            time.sleep(300)
        return {"n": 3}

    stage.row("short", lambda: {"n": 4})
    stage.row("long", long)


gpu.__file__ = __file__
gpu.STAGES = {"right": right, "margins": margins}
gpu.SHARES = {"right": 3, "margins": 1}
if __name__ == "__main__":
    sys.exit(gpu.main())
