"""The ten lines of docs/dm-improves-at.md, run in a stand-in with the structure of that code's data set and trainer."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import puma

PAGE = (Path(__file__).parents[2] / "docs" / "dm-improves-at.md").read_text()
REAL, SYNTHETIC, HELD = 1100, 60, 1024


def test_ten_lines_draw_what_the_plan_keeps_and_attack_each_image_with_its_own_eps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block.strip() for block in re.findall(r"```(?:python|text)\n(.*?)```", PAGE, re.S)]
    data_set, batch, arguments, start = ([line for line in block.splitlines() if line] for block in blocks)
    trainer = [*batch, *arguments]
    assert len(data_set) + len(trainer) + len(start) == 10

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (REAL + SYNTHETIC, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(REAL + SYNTHETIC) % 10
    pool = puma.Pool([(images[:REAL], labels[:REAL]), (images[REAL:], labels[REAL:])])
    keep = rng.random(len(pool)) < 0.7
    eps = np.where(keep, rng.uniform(0, 8 / 255, len(pool)), 0).astype(np.float32)
    eps[HELD], keep[HELD] = 0, True  # trained on as it is
    puma.Plan.from_indices(pool, keep=np.flatnonzero(keep), eps=eps, threat="Linf:8/255").write(
        tmp_path / "plan.parquet"
    )
    monkeypatch.setenv("PUMA_PLAN", str(tmp_path / "plan.parquet"))

    stand_in = f"""
import os
import torch
{data_set[0]}

class Data(torch.utils.data.Dataset):
    def __init__(self, images, labels, first_synthetic, train, validation):
        self.dataset, self.train = [(image, int(label)) for image, label in zip(images, labels)], train
        self.sup_indices, self.unsup_indices = list(range(first_synthetic)), list(range(first_synthetic, len(images)))
        if self.train:
{textwrap.indent(chr(10).join(data_set[1:4]), " " * 12)}
    def __len__(self):
        return len(self.dataset)
    def __getitem__(self, item):
        {data_set[4]}

class Trainer:
    def __init__(self, params):
        self.params = params
    def train(self, loader):
        for data in loader:
            {trainer[0]}
            {trainer[1]}
            yield x, self.eps, self.loss(x)
    def loss(self, x):
        return attacked(x, {trainer[2]} {trainer[3]} steps=10)

def attacked(x_natural, step_size, epsilon, steps):
    {start[0]}
    for _ in range(steps):
        x_adv = x_adv + step_size * torch.sign(torch.randn_like(x_adv))
        x_adv = torch.min(torch.max(x_adv, x_natural - epsilon), x_natural + epsilon)
    return x_adv
"""
    space: dict[str, Any] = {"device": "cpu"}
    exec(stand_in, space)
    floats = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    data = space["Data"](floats[HELD:], labels[HELD:], REAL - HELD, True, True)
    drawn = [*data.sup_indices, *data.unsup_indices]
    np.testing.assert_array_equal(np.array(drawn) + HELD, np.flatnonzero(keep[HELD:]) + HELD)
    assert data.unsup_indices[0] >= REAL - HELD
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, drawn), batch_size=16)
    run = space["Trainer"](SimpleNamespace(attack_step=2 / 255, attack_eps=8 / 255))
    seen = [(own.flatten(), (adv - x).abs().amax((1, 2, 3))) for x, own, adv in run.train(loader)]
    own, moved = (torch.cat(part) for part in zip(*seen, strict=True))
    np.testing.assert_array_equal(own.numpy(), eps[HELD:][keep[HELD:]])
    assert bool((moved <= own + 1e-6).all())
    assert float(moved[0]) == 0
    assert bool((moved[own > 0.001] > 0).all())
    test = space["Data"](floats[:4], labels[:4], 4, False, False)
    assert len(test[0]) == 2
