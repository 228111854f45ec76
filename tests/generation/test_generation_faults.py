"""Storage faults, forged files and Ctrl-C while images are generated: nothing is lost, and the message says why."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from puma.data.load import load_dataset
from puma.errors import ModelError, StorageError
from puma.generation import Diffusion, DiffusionConfig, SamplerConfig, generate
from puma.models.weights import save_tensors

TINY = DiffusionConfig(width=16, blocks=1, steps=6, batch_size=8)
QUICK = SamplerConfig(steps=2, shard_rows=8)


def _generate(out: Path) -> bytes:
    path = generate(load_dataset("digits?subset=40"), 24, out=out, config=TINY, sampler=QUICK, checkpoint_every=2)
    return path.read_bytes()


@pytest.mark.parametrize("failing", [1, 4, 9])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_storage_fault_is_named_and_the_same_call_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, code: int
) -> None:
    whole, replace, calls = _generate(tmp_path / "whole.npz"), os.replace, 0

    def faulty(source: Any, target: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(code, os.strerror(code))
        replace(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", faulty)
        patch.setattr(Path, "replace", lambda self, target: faulty(self, target))
        with pytest.raises(StorageError) as caught:
            _generate(tmp_path / "cut.npz")
    assert caught.value.exit_code == 6
    assert caught.value.fix
    assert _generate(tmp_path / "cut.npz") == whole


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"network": "unet", "width": 4096, "blocks": 64}},
        {"config": {"width": 10**9}},
        {"config": {"blocks": 10**12}},
        {"config": {"network": "unet", "multipliers": [1] * 10**5}},
        {"image_shape": [10**6, 10**6, 3]},
        {"image_shape": "8x8"},
        {"class_names": 7},
        {"made_from": None},
    ],
    ids=str,
)
def test_a_forged_model_is_refused_from_its_header(tmp_path: Path, change: dict[str, Any]) -> None:
    meta = {"config": {}, "image_shape": [8, 8, 1], "class_names": ["0", "1"], "made_from": {}} | change
    save_tensors({}, tmp_path / "model.safetensors", "puma.diffusion/1", meta)
    started = time.process_time()
    with pytest.raises(ModelError):
        Diffusion.load(tmp_path)
    assert time.process_time() - started < 10


@pytest.mark.dist
def test_ctrl_c_ends_a_large_training_step_within_seconds(tmp_path: Path) -> None:
    """A UNet of full width on a CPU: one step of 512 images takes minutes."""
    arguments = ["generate", "digits", "--count", "10", "--out", str(tmp_path / "a.npz")]
    unet = ["network=unet", "width=96", "blocks=2", "batch_size=512", "multipliers=[1, 2]", "precision=bf16"]
    settings = [word for setting in unet for word in ("--set", setting)]
    command = [sys.executable, "-m", "puma", *arguments, *settings, "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "a.diffusion" / "settings.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.0)  # into the first step
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=90) == 130
    finally:
        process.kill()
