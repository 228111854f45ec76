"""Killed, stopped, damaged, full: what is there goes on, and ends in the same bits as an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from training_process import Training
from typer.testing import CliRunner

from puma.checkpoints import load_state, save_state
from puma.cli.app import app
from puma.data.load import load_dataset
from puma.errors import ModelError, StorageError
from puma.models.weights import weights_sha256
from puma.threat import ThreatModel
from puma.training import loop
from puma.training.loop import train
from puma.training.recipe import load_recipe
from puma.training.run import read_metrics


def finish(out, *settings):
    """(digests of the weights, steps taken, log) of a training that runs to its end."""
    training = Training(out, *settings)
    assert training.ended() == 0
    steps = [message["step"] for message in training.said if "step" in message]
    return training.said[-1], len(steps), training.log


def rows(folder):
    return [{**row, "seconds": 0, "images_per_second": 0} for row in read_metrics(folder / "metrics.csv")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return finish(folder)[0], rows(folder)


def test_killed_three_times_at_odd_moments_and_resumed_is_the_same_to_the_bit(tmp_path, whole):
    weights, metrics = whole
    for step in (5, 9, 18):  # none of them right after a checkpoint (every 4), a validation (6) or a log row (5)
        assert Training(tmp_path, "slow=0.02").until_step(step).ended(signal.SIGKILL) == -signal.SIGKILL
    found, steps, log = finish(tmp_path)
    assert found == weights
    assert steps <= 24 - 16  # from the checkpoint of step 16, or of one that was written before the signal came
    assert "last bits" not in log
    assert rows(tmp_path) == metrics


def test_sigterm_writes_a_checkpoint_of_this_very_step_and_ends_with_143(tmp_path, whole):
    training = Training(tmp_path, "slow=0.3").until_step(8)
    for _ in range(2):  # SLURM sends several
        os.kill(training.process.pid, signal.SIGTERM)
        time.sleep(0.05)
    assert training.ended(signal.SIGTERM) == 143
    last = max([8] + [m["step"] for m in training.said if isinstance(m, dict) and "step" in m])
    done = load_state(tmp_path / "checkpoints")[1]["step"]
    assert done == last + 1
    assert finish(tmp_path)[:2] == (whole[0], 24 - done)


def test_ctrl_c_writes_a_checkpoint_too(tmp_path):
    training = Training(tmp_path, "slow=0.05").until_step(6)
    assert training.ended(signal.SIGINT) != 0
    assert load_state(tmp_path / "checkpoints")[1]["step"] >= 7


def test_a_damaged_state_is_passed_over_by_name(tmp_path, whole):
    Training(tmp_path, "slow=0.02").until_step(13).ended(signal.SIGKILL)
    newest = sorted((tmp_path / "checkpoints").glob("state-*"))[-1]
    before = load_state(tmp_path / "checkpoints")[1]["step"] - 4
    data = bytearray(newest.read_bytes())
    data[-500] ^= 1
    newest.write_bytes(data)
    found, steps, log = finish(tmp_path)
    assert f"{newest.name} is damaged: its checksum does not fit" in log
    assert "going back to the state before it" in log
    assert (found, steps) == (whole[0], 24 - before)


def test_a_change_of_threads_and_of_the_processor_is_named(tmp_path):
    Training(tmp_path, "slow=0.02").until_step(4).ended(signal.SIGKILL)
    settings = json.loads((tmp_path / "run.json").read_text())
    here = settings["environment"]["processor"]
    del settings["checksum"]
    settings["environment"] |= {"threads": 64, "processor": "AVX9000"}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    log = finish(tmp_path)[2]
    assert f"processor: 'AVX9000' there, {here!r} now; threads: 64 there, 1 now" in log
    assert "the last bits of the result may differ" in log


def test_tensorboard_of_a_resumed_training_holds_every_step_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = ["train", "--real", "digits", "--threat", "Linf:0.2", "--model", "small-cnn", "--recipe", "digits"]
    short = ("steps=6", "batch_size=32", "attack_steps=1", "log_every=1", "checkpoint_every=4", "validation_steps=1")
    given += [word for pair in short for word in ("--set", pair)]
    given += ["--validation", "40", "--logger", "tensorboard", "--quiet", "--device", "cpu", "--out", str(tmp_path)]
    take_step = loop.Training.take_step

    def killed(training, step):
        if step == 5:
            raise KeyboardInterrupt
        take_step(training, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "take_step", killed)
        assert CliRunner().invoke(app, given).exit_code != 0
    lost = read_metrics(tmp_path / "metrics.csv")[4]  # step 5 is taken again, from the state of step 4
    assert CliRunner().invoke(app, given).exit_code == 0
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert lost["step"] == metrics[4]["step"] == 5
    assert lost["seconds"] != metrics[4]["seconds"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {"train/loss": "loss", "train/seconds": "seconds", "validation/robust": "validation_robust"}
    assert names.keys() <= set(events.Tags()["scalars"])
    for tag, column in names.items():
        rows = [row for row in metrics if column in row]
        found = events.Scalars(tag)
        assert [event.step for event in found] == [row["step"] for row in rows]
        assert [event.value for event in found] == pytest.approx([row[column] for row in rows])


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


def test_a_full_disk_leaves_the_last_good_state_and_the_run_goes_on(tmp_path):
    """On a tmpfs that one state fits on, and not two, where root may mount one."""
    small, whole = tmp_path / "small", tmp_path / "whole"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=420k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    pool, recipe = load_dataset("digits"), load_recipe("digits", steps=6, batch_size=32, checkpoint_every=2)
    threat = ThreatModel("Linf", 0.2)
    try:
        with pytest.raises(StorageError, match="no space left") as caught:
            train("small-cnn", pool, threat=threat, recipe=recipe, out=small / "run")
        assert caught.value.exit_code == 6
        assert [path.name for path in (small / "run" / "checkpoints").iterdir()] == ["state-000000002.safetensors"]
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        resumed = train("small-cnn", pool, threat=threat, recipe=recipe, out=small / "run").model
        assert load_state(small / "run" / "checkpoints")[1]["step"] == 6
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
    uninterrupted = train("small-cnn", pool, threat=threat, recipe=recipe, out=whole).model
    assert weights_sha256(resumed) == weights_sha256(uninterrupted)
