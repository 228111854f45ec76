"""Killed, stopped, damaged, full: what is there goes on, and ends in the same bits as an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puma.checkpoints import load_state, save_state
from puma.errors import ModelError, StorageError
from puma.models.weights import weights_sha256
from puma.training.metrics import read_metrics

SCRIPT = Path(__file__).with_name("training_process.py")


def start(out, *settings):
    command = [sys.executable, str(SCRIPT), str(out), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(out, *settings):
    process = start(out, *settings)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    steps = [line for line in output.splitlines() if line.startswith("step")]
    return json.loads(output.splitlines()[-1]), len(steps), errors


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step} "):
            return
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return finish(folder)[0], [
        {**row, "seconds": 0, "images_per_second": 0} for row in read_metrics(folder / "metrics.csv")
    ]


def test_killed_three_times_at_odd_moments_and_resumed_is_the_same_to_the_bit(tmp_path, whole):
    weights, metrics = whole
    for step in (5, 9, 18):  # none of them right after a checkpoint (every 4), a validation (6) or a log row (5)
        process = start(tmp_path)
        wait_for_step(process, step)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    found, steps, errors = finish(tmp_path)
    assert found == weights
    assert steps == 24 - 16  # from the checkpoint of step 16
    assert "bit-exact" not in errors
    rows = [{**row, "seconds": 0, "images_per_second": 0} for row in read_metrics(tmp_path / "metrics.csv")]
    assert rows == metrics


def test_sigterm_writes_a_checkpoint_of_this_very_step_and_ends_with_143(tmp_path, whole):
    process = start(tmp_path, "slow=0.05")
    wait_for_step(process, 9)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    done = load_state(tmp_path / "checkpoints")[1]["step"]
    assert 10 <= done <= 12
    assert finish(tmp_path, "slow=0")[:2] == (whole[0], 24 - done)


def test_ctrl_c_writes_a_checkpoint_too(tmp_path):
    process = start(tmp_path, "slow=0.05")
    wait_for_step(process, 6)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert 7 <= load_state(tmp_path / "checkpoints")[1]["step"] <= 9


def test_a_damaged_state_is_passed_over_by_name(tmp_path, whole):
    process = start(tmp_path)
    wait_for_step(process, 13)
    process.kill()
    process.communicate(timeout=60)
    newest = tmp_path / "checkpoints" / "state-000000012.safetensors"
    data = bytearray(newest.read_bytes())
    data[-500] ^= 1
    newest.write_bytes(data)
    found, steps, errors = finish(tmp_path)
    assert "state-000000012.safetensors is damaged: its checksum does not fit" in errors
    assert "going on from" in errors
    assert "state-000000008.safetensors" in errors
    assert (found, steps) == (whole[0], 24 - 8)


def test_a_change_of_threads_is_named(tmp_path):
    process = start(tmp_path)
    wait_for_step(process, 4)
    process.kill()
    process.communicate(timeout=60)
    settings = json.loads((tmp_path / "run.json").read_text())
    settings["environment"]["threads"] = 64
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert "not bit-exact: threads 64 -> 1" in finish(tmp_path)[2]


def test_no_whole_state_is_an_error_and_not_a_fresh_start(tmp_path):
    tensors = {"weight": torch.rand(40)}
    for step in (1, 2):
        path = save_state(tmp_path, step, tensors, {})
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match="no state of this run is whole"):
        load_state(tmp_path)


def test_two_states_are_kept_and_a_stale_temporary_file_is_no_state(tmp_path):
    for step in range(1, 5):
        save_state(tmp_path, step, {"weight": torch.full((3,), float(step))}, {"note": step})
    (tmp_path / ".state-000000009.safetensors.77.tmp").write_bytes(b"half")
    assert sorted(path.name for path in tmp_path.glob("state-*")) == [f"state-{s:09d}.safetensors" for s in (3, 4)]
    tensors, meta = load_state(tmp_path)
    assert (meta["step"], tensors["weight"][0]) == (4, 4.0)
    assert load_state(tmp_path / "nothing") is None


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    import errno

    import puma.models.weights as weights

    tensors = {"weight": torch.rand(1000)}
    save_state(tmp_path, 1, tensors, {})

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(StorageError, match="no space left"):
        save_state(tmp_path, 2, tensors, {})
    assert weights_sha256(load_state(tmp_path)[0]) == weights_sha256(tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["state-000000001.safetensors"]
