"""Test images from whatever holds them, with the model's class numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from puma.data.load import load_dataset
from puma.data.objects import load_mapstyle
from puma.data.source import MapStyle, Source
from puma.errors import DataError
from puma.io import fingerprint
from puma.models.weights import class_map, unwrap

TestData = Source | MapStyle | DataLoader[Any] | str | Path


def open_test_set(dataset: TestData, model: nn.Module) -> Source:
    """The test images, with the model's class numbers where both have class names.

    Raises:
        DataError: not images and labels, or classes that the model does not know.
    """
    if isinstance(dataset, (str, Path)):
        source = load_dataset(dataset)
    elif isinstance(dataset, Source):
        source = dataset
    else:
        source = load_mapstyle(_loader_items(dataset) if isinstance(dataset, DataLoader) else dataset)
    numbers = class_map(model, source.class_names, source.name)
    if numbers is None:
        return source
    digest = fingerprint([source.fingerprint, numbers.tolist()])
    names: Any = unwrap(model).class_names
    return Source(source.images, numbers[source.labels], name=source.name, fingerprint=digest, class_names=names)


def _loader_items(loader: DataLoader[Any]) -> list[tuple[NDArray[np.uint8], int]]:
    """The images of a loader in the order of its dataset, not shuffled, as uint8 ``[H, W, C]`` with their labels.

    Raises:
        DataError: batches that are not images and labels, or pixels that are not multiples of 1/255.
    """
    if not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None:
        size = loader.batch_size or 256
        loader = DataLoader(loader.dataset, size, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
    items: list[tuple[NDArray[np.uint8], int]] = []
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)):
            raise DataError("the loader's batches are not pairs (images, labels)", fix="give the dataset itself")
        images, labels = batch
        if images.is_floating_point():
            pixels = (images * 255).round()
            if not bool(((images * 255 - pixels).abs() < 0.01).all() & (pixels >= 0).all() & (pixels <= 255).all()):
                raise DataError(
                    "the loader's images are not 8-bit pixels in [0, 1]",
                    why="they are normalised or augmented; the model has to normalise inside",
                    fix="leave only ToTensor() in the transform",
                )
            images = pixels.to(torch.uint8)
        items += zip(images.permute(0, 2, 3, 1).numpy(), (int(label) for label in labels), strict=True)
    return items
