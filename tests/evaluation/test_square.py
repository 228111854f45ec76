"""Square in L2: our version equals the library's where that works, and works on every other image size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import nn

from puma.evaluation import evaluate
from puma.evaluation.attacks import SquareL2, library_fails
from puma.threat import ThreatModel

OPTIONS: dict[str, Any] = {"norm": "L2", "n_queries": 60, "resc_schedule": False, "seed": 3}


def linear(height: int, width: int, channels: int = 1, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes)).eval()


def batch(model: nn.Module, height: int, width: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(6, channels, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(1)


def best_images(attack: SquareAttack, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The best images of one run, broken or not."""
    attack.init_hyperparam(images)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        best: torch.Tensor = attack.attack_single_run(images, labels)[1]
    return best


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (28, 28), (32, 32), (25, 30), (13, 13)])
@pytest.mark.parametrize(("channels", "eps"), [(1, 0.2), (3, 1.5)])
def test_equal_bits_where_the_library_works(size: tuple[int, int], channels: int, eps: float) -> None:
    assert not library_fails(*size)
    model = linear(*size, channels)
    images, labels = batch(model, *size, channels)
    expected = best_images(SquareAttack(model, eps=eps, **OPTIONS), images, labels)
    assert torch.equal(best_images(SquareL2(model, eps=eps, **OPTIONS), images, labels), expected)


@pytest.mark.parametrize("height", range(1, 26))
def test_the_sizes_on_which_the_library_fails(height: int) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        for width in (3, 5, 12, 20, 24):
            model = linear(height, width)
            images, labels = batch(model, height, width)
            attack = SquareAttack(model, eps=1e-3, **{**OPTIONS, "n_queries": 2})
            try:
                attack.perturb(images, labels)
                failed = False
            except (RuntimeError, ZeroDivisionError):
                failed = True
            assert failed == library_fails(height, width), (height, width)


@pytest.mark.parametrize("size", [(12, 12), (14, 14), (18, 18), (19, 19), (24, 24), (28, 20), (64, 48), (4, 4), (1, 3)])
@pytest.mark.usefixtures("short_attacks")
def test_autoattack_standard_in_l2_on_those_sizes(size: tuple[int, int]) -> None:
    model = linear(*size)
    images, labels = batch(model, *size)
    pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    result = evaluate(model, [(p, int(y)) for p, y in zip(pixels, labels, strict=True)], ThreatModel("L2", 0.02))
    assert result.robust_accuracy is not None
    assert {entry["attack"] for entry in result.meta["log"]} >= {"square"}
    moved = best_images(SquareL2(model, eps=0.3, **OPTIONS), images, labels) - images
    norms = moved.flatten(1).norm(dim=1).numpy()
    assert np.max(norms) <= 0.3 + 1e-5
    assert np.max(norms) > 0.2
