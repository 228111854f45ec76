"""Who does which part: independent processes that never talk to each other, and how to start several on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from puma.errors import UsageError

_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


def place_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """``(worker, num_workers, local)`` as torchrun or SLURM tell it; ``(0, 1, 0)`` without them.

    >>> place_from_environment({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"})
    (3, 8, 1)
    >>> place_from_environment({})
    (0, 1, 0)

    Raises:
        UsageError: the variables are no numbers.
    """
    for rank, size, local in _LAUNCHERS:
        if rank in environment and size in environment:
            try:
                return int(environment[rank]), int(environment[size]), int(environment.get(local, "0"))
            except ValueError:
                raise UsageError(f"{rank}={environment[rank]!r}, {size}={environment[size]!r} are no numbers") from None
    return 0, 1, 0


def run_on_devices(arguments: Sequence[str], devices: int, device: str) -> int:
    """Run ``puma ARGUMENTS`` once for each device of this machine and wait; return the first exit code that is not 0.

    Every process is one worker; on GPUs process i sees GPU i. One that fails does not stop the others: what they
    finish is kept, and running the same command again makes the rest.

    What is appended wins over what was typed, and over a ``--config`` file that every process reads again.
    """
    processes = []
    try:
        for worker in range(devices):
            place = ["--devices", "1", "--worker", str(worker), "--num-workers", str(devices)]
            where = ["--device", f"cuda:{worker}" if device.startswith("cuda") else device]
            quiet = ["--quiet"] if worker and "--quiet" not in arguments else []
            command = [sys.executable, "-m", "puma", *arguments, *place, *where, *quiet]
            processes.append(subprocess.Popen(command))
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        raise
    return next((code for code in codes if code), 0)
