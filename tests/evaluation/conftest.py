"""A model and test images that are attacked in a second, and AutoAttack with fewer iterations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack
from torch import nn

Images = list[tuple[NDArray[np.uint8], int]]


def make_network(classes: int = 10, seed: int = 0) -> nn.Sequential:
    """A network for 8x8 images that depends on its seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)
        ).eval()


def label_by(model: nn.Module, count: int, seed: int = 1) -> Images:
    """Random images; most carry the model's own label, every fifth another one."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
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


@pytest.fixture
def short_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer iterations of the library's own attacks, wherever they are called from."""
    configure = AutoAttack._set_version

    def shorter(self: AutoAttack, version: str = "standard") -> None:
        configure(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 6
        self.fab.n_iter, self.square.n_queries = 3, 40

    monkeypatch.setattr(AutoAttack, "_set_version", shorter)
