"""Image sizes on which AutoAttack's Square fails in L2 are refused before anything is paid for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import nn

from puma.errors import UsageError
from puma.evaluation import evaluate
from puma.evaluation.attacks import square_fails

OPTIONS: dict[str, Any] = {"norm": "L2", "eps": 1e-3, "n_queries": 2, "resc_schedule": False, "seed": 3}


def linear(height: int, width: int, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(height * width, classes)).eval()


def batch(model: nn.Module, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(6, 1, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(1)


@pytest.mark.parametrize("height", range(1, 26))
def test_the_sizes_on_which_the_library_fails(height: int) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        for width in (3, 5, 12, 20, 24):
            model = linear(height, width)
            images, labels = batch(model, height, width)
            try:
                SquareAttack(model, **OPTIONS).perturb(images, labels)
                failed = False
            except (RuntimeError, ZeroDivisionError):
                failed = True
            assert failed == square_fails(height, width), (height, width)


@pytest.mark.parametrize("size", [(12, 12), (14, 14), (18, 18), (19, 19), (24, 24), (28, 20), (64, 48), (4, 4), (1, 3)])
def test_those_sizes_are_refused_in_l2_before_the_first_pass(size: tuple[int, int]) -> None:
    model = linear(*size)
    images, labels = batch(model, *size)
    pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    items = [(p, int(y)) for p, y in zip(pixels, labels, strict=True)]
    with pytest.raises(UsageError, match=f"L2 on images of {size[0]} x {size[1]} pixels"):
        evaluate(model, items, "L2:0.02")
    assert evaluate(model, items, "L2:0.02", attack="pgd-2").attacked_accuracy is not None
