"""Any Python dataset as a source: an object with ``__len__`` whose items are ``(image, label)``."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from puma.data.images import Rows, Shape, remembered
from puma.data.layout import check_image_layout, check_labels
from puma.data.source import ImageSource
from puma.errors import DataError

_SAMPLED = 256


class MapStyle(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def load_mapstyle(dataset: MapStyle, *, name: str | None = None, verify: str = "free") -> ImageSource:
    """Take a dataset of ``(image, label)``: uint8 ``[H, W, C]`` (or ``[H, W]``) arrays or 8-bit Pillow images.

    Labels are read from its ``labels`` or ``targets`` where it has such an attribute of its length, else by going
    through it once. The fingerprint covers the labels and 256 images spread over it (all with ``verify="full"``).
    A dataset in memory has no spec: another process cannot open it.

    Raises:
        DataError: empty, items of another form, images that differ each time they are read (a random transform).
    """
    size = len(dataset)
    called = name or type(dataset).__name__.lower()
    if not size:
        raise DataError(f"{called} is empty")
    first, _ = item_of(dataset, 0, called)
    if not np.array_equal(first, item_of(dataset, 0, called)[0]):
        raise DataError(
            f"{called}: item 0 is another image each time it is read",
            why="a random transform; margins belong to fixed images",
            fix="take the dataset without augmentation: recipes augment by themselves",
        )
    images = remembered(MapStyleImages(dataset, (size, *first.shape), called))
    sampled = np.arange(size) if verify == "full" else np.unique(np.linspace(0, size - 1, _SAMPLED).astype(np.int64))
    labels = _labels(dataset, sampled, called)
    digest = hashlib.sha256(repr(images.shape).encode() + labels.astype("<i8").tobytes())
    for start in range(0, len(sampled), 256):
        digest.update(images.read(sampled[start : start + 256]).tobytes())
    names = getattr(dataset, "classes", None) or getattr(dataset, "class_names", None)
    named = [str(text) for text in names] if names is not None and len(names) > int(labels.max()) else None
    return ImageSource(images, labels, name=called, fingerprint=digest.hexdigest(), class_names=named)


class MapStyleImages:
    """The images of a map-style dataset."""

    def __init__(self, dataset: MapStyle, shape: Shape, name: str) -> None:
        self.shape = shape
        self._dataset, self._name = dataset, name

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `puma.data.images.Images.read`."""
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows):
            image, _ = item_of(self._dataset, int(row), self._name)
            if image.shape != self.shape[1:]:
                raise DataError(
                    f"{self._name}: item {row:,} has shape {image.shape}, item 0 has {self.shape[1:]}",
                    why="all images of a source have one shape",
                )
            out[place] = image
        return out


def item_of(dataset: MapStyle, row: int, name: str) -> tuple[NDArray[np.uint8], int]:
    """Item ``row`` as uint8 ``[H, W, C]`` and an int.

    Raises:
        DataError: not a pair, a label that is no whole number, an image that is not uint8 HWC.
    """
    item = dataset[row]
    where = f"{name}: item {row:,}"
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(f"{where} is a {type(item).__name__}", why="items are pairs (image, label)")
    image, label = item
    pixels = np.asarray(image)
    if pixels.ndim == 2 and not hasattr(image, "detach"):
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise DataError(f"{where}: the image has shape {pixels.shape}", why="images are uint8 [H, W, C]")
    check_image_layout((1, *pixels.shape), pixels.dtype, pixels, f"{where}: the image (with a batch axis)")
    number = np.asarray(label)
    if number.size != 1 or number.dtype.kind not in "iu":
        raise DataError(f"{where}: the label is {label!r}", why="labels are class numbers")
    return pixels, int(number.reshape(()))


def _labels(dataset: MapStyle, sampled: Rows, name: str) -> NDArray[np.int64]:
    size = len(dataset)
    for attribute in ("labels", "targets"):
        held = getattr(dataset, attribute, None)
        if held is None or not hasattr(held, "__len__") or len(held) != size:
            continue
        labels = check_labels(np.asarray(held), size, f"{name}.{attribute}")
        for row in sampled:
            label = item_of(dataset, int(row), name)[1]
            if label != labels[row]:
                raise DataError(f"{name}: item {row:,} has label {label}, {name}.{attribute} says {labels[row]}")
        return labels
    labels = np.array([item_of(dataset, row, name)[1] for row in range(size)], np.int64)
    return check_labels(labels, size, name)
