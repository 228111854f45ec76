"""How accuracies move when the test set is drawn again: the same resample of images for every cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.errors import DataError
from puma.tradeoff.arms import CellKey

DRAWS = 1_000


@dataclass(frozen=True)
class Flags:
    """Which test images a model classifies, one entry per image of the test set in its order.

    Args:
        clean: ``[N]``, 1 where right, 0 where wrong, NaN where the image was not judged.
        robust: ``[N]``, the same under attack; NaN outside the subset that was attacked.
    """

    clean: ArrayLike
    robust: ArrayLike


@dataclass(frozen=True)
class Resampled:
    """A cell's accuracies under each resample: ``clean`` and ``robust``, float64 ``[B]``."""

    clean: NDArray[np.float64]
    robust: NDArray[np.float64]


def resample(flags: Mapping[CellKey, Flags], draws: int = DRAWS, seed: int = 0) -> dict[CellKey, Resampled]:
    """Accuracies of every cell under ``draws`` bootstrap resamples of the test images.

    The images of a resample are the same for all cells and for both accuracies, so that differences between cells keep
    what their images have in common.

    Raises:
        DataError: the cells were not judged on equally many images.
    """
    if not flags:
        return {}
    keys = list(flags)
    _check_lengths(flags)
    clean = np.stack([_column(flags[key].clean) for key in keys], axis=1)
    robust = np.stack([_column(flags[key].robust) for key in keys], axis=1)
    images = len(clean)
    rng = np.random.default_rng(seed)
    results: dict[str, list[NDArray[np.float64]]] = {"clean": [], "robust": []}
    block = max(1, 4_000_000 // max(images, 1))
    for start in range(0, draws, block):
        count = min(block, draws - start)
        weights = rng.multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)  # [b, N]
        for name, hits in (("clean", clean), ("robust", robust)):
            judged = np.isfinite(hits)
            with np.errstate(invalid="ignore", divide="ignore"):
                results[name].append((weights @ np.where(judged, hits, 0)) / (weights @ judged.astype(np.float64)))
    both = {name: np.concatenate(parts) for name, parts in results.items()}
    return {key: Resampled(both["clean"][:, i], both["robust"][:, i]) for i, key in enumerate(keys)}


def _column(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _check_lengths(flags: Mapping[CellKey, Flags]) -> None:
    lengths = {len(_column(part)) for cell in flags.values() for part in (cell.clean, cell.robust)}
    if len(lengths) != 1 or lengths == {0}:
        raise DataError(
            f"the cells were judged on different numbers of test images: {sorted(lengths)}",
            fix="evaluate all cells on the same test set",
        )
