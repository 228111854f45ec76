"""Equal images: inside a source, between two sources, between training and test data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puma.data.images import blocks
from puma.data.source import Source
from puma.progress import Progress


@dataclass(frozen=True)
class Duplicates:
    """Images of one source that occur in another (or again in itself), pixel for pixel.

    Args:
        rows: int64 ``[K]``, the rows, ascending.
        twins: int64 ``[K]``, for each the first row of the other source with the same pixels.
        conflicts: how many of them carry another label than their twin.
    """

    rows: NDArray[np.int64]
    twins: NDArray[np.int64]
    conflicts: int

    def __len__(self) -> int:
        return len(self.rows)


def image_hashes(source: Source, *, progress: bool = False) -> NDArray[np.uint64]:
    """A 64-bit hash of each image's pixels (BLAKE2b), uint64 ``[N]``, in one pass over the source."""
    out = np.empty(len(source), np.uint64)
    with Progress(f"reading {source.name}", len(source), "images", show=progress) as bar:
        for rows in blocks(len(source), source.image_shape):
            for row, image in enumerate(source.read(rows), start=rows.start):
                out[row] = int.from_bytes(hashlib.blake2b(image.data, digest_size=8).digest(), "little")
            bar.advance(rows.stop - rows.start)
    return out


def repeated(source: Source, hashes: NDArray[np.uint64]) -> Duplicates:
    """Images of ``source`` that are equal to an earlier one of it."""
    _, first, places = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[places]
    rows = np.flatnonzero(earlier != np.arange(len(hashes)))
    return _confirmed(source, rows, source, earlier[rows])


def shared(source: Source, hashes: NDArray[np.uint64], other: Source, other_hashes: NDArray[np.uint64]) -> Duplicates:
    """Images of ``source`` that occur in ``other``."""
    if source.image_shape != other.image_shape:
        return Duplicates(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    values, first = np.unique(other_hashes, return_index=True)
    places = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
    rows = np.flatnonzero(values[places] == hashes)
    return _confirmed(source, rows, other, first[places[rows]])


def _confirmed(source: Source, rows: NDArray[np.int64], other: Source, twins: NDArray[np.int64]) -> Duplicates:
    """Only the pairs whose pixels are equal, not just their hashes."""
    equal = np.zeros(len(rows), dtype=bool)
    for piece in blocks(len(rows), source.image_shape):
        one, two = source.read(rows[piece]), other.read(twins[piece])
        equal[piece] = (one == two).reshape(len(one), -1).all(1)
    rows, twins = rows[equal], twins[equal]
    return Duplicates(rows, twins, int((source.labels[rows] != other.labels[twins]).sum()))
