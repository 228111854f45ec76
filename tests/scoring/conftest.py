"""A pool of real digits, and a margin model of them that takes no training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import puma
from puma.data.pool import read_batch
from puma.models.weights import save_model


class Small(nn.Module):
    """A linear classifier of 8x8 digits, fitted in closed form: fast, and right about most digits."""

    def __init__(self, pool: puma.Pool) -> None:
        super().__init__()
        images, labels = read_batch(pool, np.arange(len(pool)))
        design = torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1)
        target = torch.nn.functional.one_hot(labels, 10).float() * 10
        weight = torch.linalg.solve(design.T @ design + 3 * torch.eye(65), design.T @ target)
        self.linear = nn.Linear(64, 10)
        with torch.no_grad():
            self.linear.weight.copy_(weight[:64].T)
            self.linear.bias.copy_(weight[64])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


@pytest.fixture(scope="session")
def pool() -> puma.Pool:
    return puma.Pool([puma.load_dataset("digits")])


@pytest.fixture
def model(pool: puma.Pool) -> nn.Module:
    return Small(pool).eval()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """The weights file of a network that is right about most digits: a wrong one takes long to search."""
    torch.manual_seed(0)
    model = puma.build_model("small-cnn", 10, in_channels=1, image_size=8)
    images, labels = read_batch(puma.load_dataset("digits"), np.arange(898))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.arange(128) + 128 * (step % 7)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_model(model.eval(), path)
    return path
