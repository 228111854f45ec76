"""What a terminal and a log file show of a training: its rate in images too, and the device is not waited for."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from puma import progress
from puma.data.load import load_dataset
from puma.threat import ThreatModel
from puma.training.loop import train
from puma.training.recipe import load_recipe


class Waits(TorchDispatchMode):
    """Counts the numbers that the host takes off the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_training_shows_images_a_second_without_waiting_for_the_device(monkeypatch, capsys):
    monkeypatch.setenv(progress.LOG_EVERY_ENV, "0")
    pool, threat = load_dataset("digits"), ThreatModel("Linf", 0.2)
    recipe = load_recipe("digits", steps=6, batch_size=32, attack_steps=1, log_every=100)
    waits = {}
    for show in (False, True):
        with Waits() as mode:
            train("small-cnn", pool, threat=threat, recipe=recipe, progress=show)
        waits[show] = mode.count
    assert waits[True] == waits[False] > 0
    found = re.findall(r"training: \d/6 steps ([\d.,]+)/s(?:, ETA \d+ s)?, ([\d,]+) images/s", capsys.readouterr().err)
    assert len(found) == 7  # one a step and the last word
    for steps, images in found:
        assert float(images.replace(",", "")) == pytest.approx(32 * float(steps.replace(",", "")), rel=0.15)
