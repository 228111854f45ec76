"""Which arm beats which in both accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puma.tradeoff.arms import Arm, Cell, by_arm


@dataclass(frozen=True)
class Dominance:
    """Pareto dominance between the arms of one setting.

    Args:
        arms: in the order of rows and columns.
        by_mean: bool ``[A, A]``: the row's mean accuracies are both at least the column's and one is higher; over the
            seeds the two have in common.
        seeds: int ``[A, A]``, in how many common seeds the row dominates the column.
        common: int ``[A, A]``, how many seeds the two have in common with both accuracies measured.
    """

    arms: tuple[Arm, ...]
    by_mean: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    common: NDArray[np.int64]

    @property
    def undominated(self) -> list[Arm]:
        """Arms that no other beats by its means."""
        return [arm for column, arm in enumerate(self.arms) if not self.by_mean[:, column].any()]


def dominance(cells: Sequence[Cell]) -> Dominance:
    """Compare every arm with every other, paired by seed; the cells have to be of one setting."""
    runs = by_arm(cells)
    arms = tuple(runs)
    shape = len(arms), len(arms)
    by_mean, seeds, common = np.zeros(shape, bool), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, one in enumerate(arms):
        for j, two in enumerate(arms):
            if i == j:
                continue
            both = [(runs[one][seed], runs[two][seed]) for seed in runs[one] if seed in runs[two]]
            both = [pair for pair in both if all(math.isfinite(cell.clean + cell.robust) for cell in pair)]
            if not both:
                continue
            differences = np.array([[a.clean - b.clean, a.robust - b.robust] for a, b in both])
            mean = differences.mean(axis=0)
            common[i, j] = len(both)
            seeds[i, j] = int(np.count_nonzero((differences >= 0).all(axis=1) & (differences > 0).any(axis=1)))
            by_mean[i, j] = bool((mean >= 0).all() and (mean > 0).any())
    return Dominance(arms, by_mean, seeds, common)
