"""The images a model is judged on: any dataset, checked once, and the rows that are attacked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puma.data.load import as_source
from puma.data.sampler import stratified_rows
from puma.data.source import MapStyle, Source
from puma.data.tensors import to_tensor
from puma.errors import UsageError


@dataclass(frozen=True)
class TestSet:
    """Test images with their labels and the rows to attack.

    Args:
        labels: int64 ``[N]``.
        rows: int64 ``[M]``, ascending: the rows to attack, all of them unless a subset was asked for.
        fingerprint: SHA-256 of images and labels (of a puma source: its own).
        source: reads images.
    """

    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    fingerprint: str
    source: Source

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Images float32 ``[B, C, H, W]`` in [0, 1] and labels int64 ``[B]`` on ``device``."""
        labels = torch.from_numpy(self.labels[rows]).to(device)
        return to_tensor(self.source.read(rows), device), labels


def open_test_set(dataset: Source | MapStyle, subset: int | None, subset_seed: int) -> TestSet:
    """Read and check a dataset, and choose the rows to attack.

    Args:
        dataset: a puma source, or any map-style dataset of ``(uint8 [H, W, C], label)``.
        subset: None attacks every image; else a stratified choice of this many.
        subset_seed: seed of that choice.

    Raises:
        DataError: no images, or images or labels of the wrong type, shape or range.
        UsageError: a subset of less than one image or more than there are.
    """
    source = as_source(dataset)
    labels = np.asarray(source.labels, dtype=np.int64)
    rows = np.arange(len(labels), dtype=np.int64)
    if subset is not None:
        if not 1 <= subset <= len(labels):
            raise UsageError(f"a subset of {subset} test images of {len(labels)}", fix=f"1 to {len(labels)}")
        rows = rows if subset == len(labels) else stratified_rows(labels, subset, subset_seed)
    return TestSet(labels, rows, source.fingerprint, source)
