"""Draw labelled images in parts, each written whole, so that an interruption costs one part at most.

A *drawer* is whatever turns image numbers and labels into pixels: our diffusion model, or a pipeline of the user's.
Image k depends on the drawer's settings and on k only, never on how many are drawn or in what batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from puma.data.edmfile import write_edm
from puma.errors import UsageError
from puma.generation.output import read_part
from puma.io import fingerprint
from puma.progress import Progress
from puma.rng import Stream, counter_generator


class Drawer(Protocol):
    """Draws image k of a seed under a label."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON of everything that decides the pixels: weights, seed, sampler."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what is drawn."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label."""
        ...

    def __call__(self, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images ``indices`` under ``labels``; uint8 [B, H, W, C]."""
        ...


def condition_labels(
    indices: NDArray[np.int64], num_classes: int, *, seed: int = 0, shares: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """Labels that images ``indices`` are drawn for; int64, of the shape of ``indices``.

    Balanced and interleaved (0, 1, 2, ..., 0, 1, ...) without ``shares``; else random with those class shares. Image
    k's label does not depend on how many images are asked for.

    >>> condition_labels(np.arange(5), 3)
    array([0, 1, 2, 0, 1])
    """
    if shares is None:
        return indices % num_classes
    uniform = np.array([counter_generator(seed, Stream.LABEL, int(index)).random() for index in indices])
    return np.searchsorted(np.cumsum(shares / shares.sum())[:-1], uniform, side="right").astype(np.int64)


def draw_parts(
    drawer: Drawer,
    count: int,
    folder: Path,
    *,
    batch_size: int,
    part_rows: int,
    seed: int = 0,
    shares: NDArray[np.float64] | None = None,
    progress: bool = False,
) -> list[Path]:
    """Write images 0 .. count - 1 as part files; parts that are there already are kept.

    Batches never cross a part, so a part's bytes depend on the settings only. A part of other settings, or a broken
    one, is made again.

    Args:
        drawer: what draws.
        count: how many images.
        folder: where the parts go.
        batch_size: images drawn at once.
        part_rows: images per part.
        seed: of random labels.
        shares: class shares [num_classes]; None for balanced labels.
        progress: show a bar.

    Returns:
        The part files in order.
    """
    settings = fingerprint(
        {
            "drawer": drawer.identity,
            "batch_size": batch_size,
            "labels": None if shares is None else [seed, *shares.tolist()],
        }
    )
    spans = [(start, min(start + part_rows, count)) for start in range(0, count, part_rows)]
    paths = [folder / f"part-{start:012d}.npz" for start, _ in spans]
    missing = [
        (path, start, stop)
        for path, (start, stop) in zip(paths, spans, strict=True)
        if read_part(path, settings, stop - start) is None
    ]
    left = sum(stop - start for _, start, stop in missing)
    shape = drawer.image_shape if missing else (0, 0, 0)  # a pipeline that does not work fails here, before the work
    with Progress("sampling", count, "images", show=progress, done=count - left) as bar:
        for path, start, stop in missing:
            images, labels = [], []
            for indices in _batches(start, stop, batch_size):
                label = condition_labels(indices, len(drawer.class_names), seed=seed, shares=shares)
                images.append(_checked(drawer(indices, label), (len(indices), *shape)))
                labels.append(label)
                bar.advance(len(indices))
            write_edm(path, images, np.concatenate(labels), comment={"settings": settings})
    return paths


def _checked(images: NDArray[np.uint8], wanted: tuple[int, ...]) -> NDArray[np.uint8]:
    if images.shape != wanted or images.dtype != np.uint8:
        raise UsageError(
            f"the generator drew {images.dtype} {images.shape}, not uint8 {wanted}",
            fix="give the image size that it draws, or one to resize to",
        )
    return images


def _batches(start: int, stop: int, size: int) -> Iterator[NDArray[np.int64]]:
    for first in range(start, stop, size):
        yield np.arange(first, min(first + size, stop), dtype=np.int64)
