"""Where pixels come from: readers of uint8 ``[N, H, W, C]`` images, and views that choose, join and convert them.

A reader has a ``shape`` and a ``read``; it never holds more than it was asked for, except where its docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Shape = tuple[int, int, int, int]
_BLOCK = 16 << 20


def blocks(count: int, image_shape: tuple[int, int, int]) -> Iterator[slice]:
    """Neighbouring rows of ``0..count-1`` that take about 16 MiB, one block after the other.

    >>> list(blocks(5, (2048, 4096, 1)))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows = max(1, _BLOCK // math.prod(image_shape))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


class Images(Protocol):
    """A reader of N images."""

    @property
    def shape(self) -> Shape:
        """``(N, H, W, C)``."""
        ...

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """The images at ``rows`` (each in ``[0, N)``, any order, repeats allowed): a fresh uint8 ``[B, H, W, C]``."""
        ...


class ArrayImages:
    """Images that lie in memory."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self._array = array
        n, height, width, channels = array.shape
        self.shape: Shape = (n, height, width, channels)

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `Images.read`."""
        return np.ascontiguousarray(self._array[rows])


class SelectedImages:
    """Some rows of another reader, in the order of ``rows``."""

    def __init__(self, images: Images, rows: Rows) -> None:
        self._images, self._rows = images, rows
        self.shape: Shape = (len(rows), *images.shape[1:])

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `Images.read`."""
        return self._images.read(self._rows[rows])


class JoinedImages:
    """Several readers of equal image shape, one after the other."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self._parts = list(parts)
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self.shape: Shape = (int(self._ends[-1]), *parts[0].shape[1:])

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `Images.read`."""
        owner = np.searchsorted(self._ends, rows, side="right")
        if len(rows) and (first := owner[0]) == owner[-1] and (owner == first).all():
            return self._parts[int(first)].read(rows - (self._ends[first] - self._parts[int(first)].shape[0]))
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for number in np.unique(owner):
            mine = owner == number
            start = self._ends[number] - self._parts[number].shape[0]
            out[mine] = self._parts[number].read(rows[mine] - start)
        return out


class RgbImages:
    """Greyscale images with their one channel three times."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self.shape: Shape = (*images.shape[:3], 3)

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `Images.read`."""
        return np.repeat(self._images.read(rows), 3, axis=3)


class ResizedImages:
    """Images scaled to ``size`` x ``size`` (see `puma.data.encoded.resized` for the filter)."""

    def __init__(self, images: Images, size: int) -> None:
        self._images = images
        self._size = size
        n, _, _, channels = images.shape
        self.shape: Shape = (n, size, size, channels)

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `Images.read`."""
        from puma.data.encoded import resized

        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, image in enumerate(self._images.read(rows)):
            out[place] = resized(image, self._size)
        return out


_REMEMBERED = 1 << 30


def remembered(images: Images) -> Images:
    """``images`` with each made only once, if all of them take at most 1 GiB."""
    return RememberedImages(images) if math.prod(images.shape) <= _REMEMBERED else images


class RememberedImages:
    """Images that cost something to make, each made once and kept."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self.shape: Shape = images.shape
        self._known = np.zeros(self.shape[0], dtype=bool)
        self._array = np.empty(self.shape, np.uint8)  # the system hands out its pages only as images arrive

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `Images.read`."""
        fresh = np.unique(rows[~self._known[rows]])
        if len(fresh):
            self._array[fresh] = self._images.read(fresh)
            self._known[fresh] = True
        return np.ascontiguousarray(self._array[rows])
