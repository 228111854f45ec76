"""A model and test images that are attacked in a second."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

Images = list[tuple[NDArray[np.uint8], int]]


def make_network(classes: int = 10, pixels: int = 8, seed: int = 0) -> nn.Sequential:
    """A network that depends on its seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (pixels // 2) ** 2, classes)
        ).eval()


def label_by(model: nn.Module, count: int, pixels: int = 8, seed: int = 1) -> Images:
    """Random images; most carry the model's own label, every fifth another one."""
    images = np.random.default_rng(seed).integers(0, 256, (count, pixels, pixels, 1), dtype=np.uint8)
    with torch.no_grad():
        logits = model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    labels = logits.argmax(1).numpy()
    labels[::5] = (labels[::5] + 1) % logits.shape[1]
    return [(image, int(label)) for image, label in zip(images, labels, strict=True)]


@pytest.fixture
def network() -> nn.Sequential:
    return make_network()


@pytest.fixture
def images(network: nn.Sequential) -> Images:
    return label_by(network, 40)


@pytest.fixture
def labelled() -> Callable[..., Images]:
    return label_by


@pytest.fixture
def new_network() -> Callable[..., nn.Sequential]:
    return make_network
