"""Several processes: the same training as one, all ranks alike, and a job that ends when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puma.models.weights import load_model

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).with_name("training_process.py")


def torchrun(out, *settings, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(SCRIPT), str(out), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finished(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], output


def test_two_processes_train_as_one_does(tmp_path):
    settings = ("norm=group", "steps=8", "attack_steps=3")
    results, _ = finished(torchrun(tmp_path / "two", *settings))
    assert len(results) == 2
    assert results[0] == results[1]  # every rank ends in the same weights
    one = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "one"), *settings], check=False, timeout=240)
    assert one.returncode == 0
    for which in ("last", "best"):
        models = [load_model(tmp_path / run / f"{which}.safetensors") for run in ("one", "two")]
        for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            assert (a - b).abs().max() < 1e-6, name


def test_a_killed_rank_ends_the_job_and_it_resumes(tmp_path):
    process = torchrun(tmp_path, "slow=0.2")
    victim = None
    for line in process.stdout:
        if line.startswith("step 6 of rank 1"):
            victim = int(line.split()[-1])
            break
    assert victim is not None, process.stderr.read()
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode not in (0, None)
    results, output = finished(torchrun(tmp_path, "slow=0"))
    assert results[0] == results[1]
    assert output.count("of rank 0") == 24 - 4  # from the checkpoint of step 4
    uninterrupted, _ = finished(torchrun(tmp_path / "again", "slow=0"))
    assert uninterrupted[0] == results[0]
