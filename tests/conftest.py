"""Shared by all tests: one thread each (two processes of two threads each are slower than two of one)."""

from __future__ import annotations

import os
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder of real CIFAR-10 in the Hugging Face layout that may lie beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("shared CIFAR-10 is absent")
    return folder
