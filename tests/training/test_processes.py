"""Several processes: the same training as one, all ranks alike, and a job that ends when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from training_process import Training
from typer.testing import CliRunner

from puma.cli.app import app
from puma.models.weights import load_model
from puma.training.run import read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("training_process.py")


def torchrun(out, *settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(out), *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def messages(process):
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def finished(process):
    said = messages(process)
    return [m for m in said if "last" in m], [m["step"] for m in said if m.get("rank") == 0]


NETWORK = """
from puma import build_model


def grouped():
    return build_model("small-cnn", 10, in_channels=1, image_size=8, norm="group")
"""


def command(out, devices, every=2):
    """``puma train`` as a user types it."""
    settings = ("steps=10", "batch_size=768", "attack_steps=3", "log_every=4", f"checkpoint_every={every}")
    typed = ["train", "--real", "digits", "--threat", "Linf:0.2", "--model", "norms:grouped", "--recipe", "digits"]
    typed += [word for pair in settings for word in ("--set", pair)]
    return [*typed, "--device", "cpu", "--quiet", "--devices", str(devices), "--out", out]


def test_devices_of_the_command_line_killed_and_resumed_train_as_one_does(tmp_path, monkeypatch):
    (tmp_path / "norms.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two_processes = [sys.executable, "-m", "puma", *command("two", 2)]
    job = subprocess.Popen(two_processes, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("two/checkpoints/state-*.safetensors")):
        assert job.poll() is None
        time.sleep(0.02)
    processes = {child.environ().get("RANK"): child for child in psutil.Process(job.pid).children()}
    os.kill(processes["1"].pid, signal.SIGKILL)
    began = time.monotonic()
    _, errors = job.communicate(timeout=120)
    assert time.monotonic() - began < 10
    assert not _runs(processes["0"])
    assert job.returncode == 1
    assert "process 1 was ended by signal 9" in errors
    assert not (tmp_path / "two" / "last.safetensors").exists()
    subprocess.run(two_processes, check=True, timeout=240, capture_output=True)
    assert CliRunner().invoke(app, command("one", 1)).exit_code == 0
    one, two = (load_model(tmp_path / out).state_dict() for out in ("one", "two"))
    assert all((one[name] - two[name]).abs().max() < 1e-6 for name in one)


def test_a_resumed_training_of_three_processes_ends_in_the_same_bits(tmp_path, monkeypatch):
    """Sums of two numbers have no order, those of three have: DDP must group gradients as before.

    A row of metrics counts the steps before the checkpoint as well, of every process.
    """
    (tmp_path / "norms.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    three_processes = [sys.executable, "-m", "puma", *command("run", 3, every=5)]
    ends, rows = [], []
    for _ in range(2):
        subprocess.run(three_processes, check=True, timeout=240, capture_output=True)
        ends.append(load_model(tmp_path / "run" / "last.safetensors").state_dict())
        rows.append([(row["clean_accuracy"], row["adversarial_accuracy"]) for row in read_metrics("run/metrics.csv")])
        for name in ("last.safetensors", "best.safetensors", "checkpoints/state-000000010.safetensors"):
            (tmp_path / "run" / name).unlink()  # as a job leaves it that was killed after step 5
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    assert rows[0] == rows[1]


def _runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_processes_train_as_one_does(tmp_path):
    settings = ("norm=group", "steps=8", "attack_steps=3")
    results, _ = finished(torchrun(tmp_path / "two", *settings))
    assert len(results) == 2
    assert results[0] == results[1]  # every rank ends in the same weights
    assert Training(tmp_path / "one", *settings).ended() == 0
    for which in ("last", "best"):
        models = [load_model(tmp_path / run / f"{which}.safetensors") for run in ("one", "two")]
        for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
            assert (a - b).abs().max() < 1e-6, name


def test_every_process_validates_the_same_average(tmp_path):
    """Running statistics are each process's own until they are shared."""
    said = messages(torchrun(tmp_path, "steps=6", "validation_every=3"))
    validated = Counter(message["validated"] for message in said if "validated" in message)
    assert list(validated.values()) == [2, 2]  # two validations, each of one network by two processes


def test_a_killed_rank_ends_the_job_and_it_resumes(tmp_path):
    """With batch normalisation, whose statistics differ between ranks until they are shared."""
    process = torchrun(tmp_path, "slow=0.2")
    pids = {}
    for line in process.stdout:
        said = json.loads(line) if line.startswith("{") else {}
        pids[said.get("rank")] = said.get("pid")
        if (said.get("step"), said.get("rank")) == (6, 1):
            break
    survivor = psutil.Process(pids[0])
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    while _runs(survivor) and time.monotonic() - began < 60:
        time.sleep(0.05)
    assert time.monotonic() - began < 10
    process.communicate(timeout=120)  # torchrun itself needs a moment to report and to leave
    assert process.returncode != 0
    results, steps = finished(torchrun(tmp_path))
    assert results[0] == results[1]
    assert steps == list(range(4, 24))  # from the checkpoint of step 4


def test_no_process_ends_before_the_first_one_has_written(tmp_path):
    """Launchers kill the others when one has ended; at the end all of them read what the first one wrote."""
    settings = ("slow_disk=1", "steps=6", "validation_every=6", "checkpoint_every=100")
    process = torchrun(tmp_path, "slow=0.1", *settings)
    pids, times = {}, {"ends": [], "written": []}
    for line in process.stdout:
        said = json.loads(line) if line.startswith("{") else {}
        for name in times.keys() & said.keys():
            times[name].append(said[name])
        if said.get("step") == 1:
            pids[said["rank"]] = said["pid"]
            if len(pids) == 2:
                for pid in pids.values():
                    os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=120)
    assert len(times["ends"]) == 2
    assert min(times["ends"]) > max(times["written"])
    results, steps = finished(torchrun(tmp_path, *settings))
    assert len(results) == 2
    assert steps == [5]  # the processes agree to stop after each fifth step
