"""Augmentation and batches against loops over images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.errors import UsageError
from puma.threat import ThreatModel
from puma.training.batches import Batches, Shifts, draw_shifts, shift
from puma.training.recipe import load_recipe

THREAT = ThreatModel("Linf", 0.2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shift_is_pad_crop_mirror(dtype):
    images = torch.randint(1, 255, (20, 3, 6, 9), generator=generator()).to(dtype)
    shifts = draw_shifts(20, 4, True, generator(1))
    fast = shift(images, shifts)
    assert fast.dtype == dtype
    for i in range(20):
        padded = torch.zeros(3, 6 + 8, 9 + 8, dtype=dtype)
        padded[:, 4:10, 4:13] = images[i]
        top, left = 4 + int(shifts.down[i]), 4 + int(shifts.right[i])
        crop = padded[:, top : top + 6, left : left + 9]
        assert torch.equal(fast[i], crop.flip(2) if shifts.mirrored[i] else crop)


def test_draws_are_uniform():
    shifts = draw_shifts(20_000, 2, True, generator())
    for drawn in (shifts.down, shifts.right):
        counts = torch.bincount(drawn + 2, minlength=5) / 20_000
        assert counts.shape == (5,)
        assert (counts - 0.2).abs().max() < 0.015
    assert abs(float(shifts.mirrored.float().mean()) - 0.5) < 0.015
    assert not draw_shifts(50, 0, False, generator()).mirrored.any()


def test_no_shift_is_the_image():
    images = torch.rand(4, 1, 8, 8)
    still = Shifts(torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(shift(images, still), images)


def batches(recipe, rank=0, world=1, eps=None, seed=0):
    pool = Pool([load_dataset("digits"), load_dataset("digits:test")])
    eps = np.linspace(0, 0.2, len(pool), dtype=np.float32) if eps is None else eps
    keep = np.ones(len(pool), dtype=bool)
    devices = SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world)
    return Batches(pool, keep, eps, recipe, THREAT, devices, seed=seed)


def test_processes_share_exactly_the_batch_of_one():
    recipe = load_recipe("digits", batch_size=12, crop=1, flip=True)
    whole = batches(recipe).get(5)
    for rank in range(3):
        part = batches(recipe, rank, 3).get(5)
        for name in ("images", "labels", "eps", "noise"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rank::3]), name
        assert np.array_equal(part.rows, whole.rows)


def test_a_batch_follows_from_seed_and_step_alone():
    recipe = load_recipe("digits", batch_size=16, crop=1)
    one, other = batches(recipe), batches(recipe)
    for step in (7, 3):
        one.get(step)
    again, fresh = one.get(9), other.get(9)
    assert torch.equal(again.images, fresh.images)
    assert torch.equal(again.noise, fresh.noise)
    assert not torch.equal(again.noise, one.get(10).noise)
    assert not torch.equal(again.noise, batches(recipe, seed=1).get(9).noise)


def test_images_labels_and_radii_belong_together():
    recipe = load_recipe("digits", batch_size=64)
    made = batches(recipe)
    batch = made.get(2)
    for i, row in enumerate(batch.rows):
        image, label = made.pool[int(row)]
        assert torch.equal(batch.images[i, 0], torch.from_numpy(image[:, :, 0]).float() / 255)
        assert int(batch.labels[i]) == label
        assert float(batch.eps[i]) == made.eps[row]
    assert made.pool.synthetic[batch.rows].sum() == int(64 * 0.7)


def test_batches_that_cannot_be():
    with pytest.raises(UsageError, match="shared evenly by 5"):
        batches(load_recipe("digits", batch_size=12), 0, 5)
    with pytest.raises(UsageError, match="larger than the 1,797 images"):
        batches(load_recipe("digits", batch_size=4000))
