"""Shared by all tests: one thread each (two processes of two threads each are slower than two of one)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# For the processes that tests start; this one is told below.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder of real CIFAR-10 in the Hugging Face layout that may lie beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("shared CIFAR-10 is absent")
    return folder
