"""The images a model is judged on: any dataset, checked once, and the rows that are attacked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puma.data.layout import check_image_layout, check_labels
from puma.data.source import Source
from puma.data.stratified import stratified_rows
from puma.data.tensors import to_tensor
from puma.errors import DataError, UsageError


class MapStyle(Protocol):
    """A map-style dataset: ``dataset[i]`` is ``(uint8 [H, W, C] array, int)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


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
    source: Any

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
    if len(dataset) == 0:
        raise DataError("the test set has no images")
    source: Any = dataset if isinstance(dataset, Source) else _Collected(dataset)
    labels = check_labels(np.asarray(source.labels), len(source), "test labels")
    rows = np.arange(len(labels), dtype=np.int64)
    if subset is not None:
        if not 1 <= subset <= len(labels):
            raise UsageError(f"a subset of {subset} test images of {len(labels)}", fix=f"1 to {len(labels)}")
        rows = rows if subset == len(labels) else stratified_rows(labels, subset, subset_seed)
    return TestSet(labels, rows, source.fingerprint, source)


class _Collected:
    """A map-style dataset read into memory (test sets are small) and checked."""

    def __init__(self, dataset: MapStyle) -> None:
        images, labels = [], []
        for row in range(len(dataset)):
            item: Any = dataset[row]
            if not isinstance(item, Sequence) or len(item) != 2:
                raise DataError(f"dataset[{row}] is {type(item).__name__}", why="an item is (image, label)")
            image = item[0]
            if not isinstance(image, np.ndarray) or image.ndim != 3:
                shape = list(getattr(image, "shape", ()))
                raise DataError(
                    f"dataset[{row}] has an image of type {type(image).__name__} {shape or ''}".rstrip(),
                    why="an image is a uint8 numpy array [H, W, C]",
                    fix="return np.asarray(image), before any transform to floats; the model normalises inside",
                )
            images.append(image)
            labels.append(int(item[1]))
        if len(shapes := {image.shape for image in images}) > 1:
            raise DataError(f"the test images have {len(shapes)} different shapes", why=", ".join(map(str, shapes)))
        self._images = np.stack(images)
        check_image_layout(self._images.shape, self._images.dtype, self._images[:64], "test images")
        self.labels = np.array(labels, dtype=np.int64)
        digest = hashlib.sha256(f"{self._images.shape}".encode())
        digest.update(self._images.data)
        digest.update(self.labels.data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        chosen: NDArray[np.uint8] = self._images[rows]
        return chosen
