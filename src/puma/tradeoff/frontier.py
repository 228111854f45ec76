"""Control frontiers in the plane of robust and clean accuracy, and the gap of a point above the higher of them.

A control (a smaller uniform eps, another TRADES beta, each on all data) gives a few measured points. Its frontier
consists of the undominated ones, joined by straight lines. Below the robust accuracy of the least robust of them it is
flat, as far down as a point was measured; beyond the measured range it is NaN. Reasons: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.errors import UsageError

MIN_POINTS = 2
Axis = Literal["clean", "robust"]


@dataclass(frozen=True)
class Frontier:
    """The measured points of one control.

    Args:
        name: ``"uniform-eps"`` or ``"trades-beta"``.
        robust: robust accuracies ``[P]``, in any order.
        clean: clean accuracies ``[P]`` of the same runs.

    >>> control = Frontier("uniform-eps", [0.2, 0.4, 0.3], [0.9, 0.7, 0.6])
    >>> control.corners
    (array([0.2, 0.4]), array([0.9, 0.7]))
    >>> control.clean_at([0.3, 0.5])
    array([0.8, nan])

    Raises:
        UsageError: lengths differ, or an accuracy is not finite.
    """

    name: str
    robust: NDArray[np.float64]
    clean: NDArray[np.float64]

    def __init__(self, name: str, robust: ArrayLike, clean: ArrayLike) -> None:
        points = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
        if points[0].shape != points[1].shape or points[0].ndim != 1 or not np.isfinite(points).all():
            raise UsageError(f"the frontier {name!r} needs as many robust as clean accuracies, all finite")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "robust", points[0])
        object.__setattr__(self, "clean", points[1])

    @cached_property
    def corners(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The undominated points: robust accuracy rising, clean accuracy falling, both strictly."""
        order = np.lexsort((-self.clean, -self.robust))
        robust, clean = self.robust[order], self.clean[order]
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(clean)[:-1]])
        free = clean > best_before
        return robust[free][::-1], clean[free][::-1]

    def clean_at(self, robust: ArrayLike) -> NDArray[np.float64]:
        """The clean accuracy the control reaches at these robust accuracies; NaN outside the measured range."""
        return self._at(robust, self.robust, *self.corners)

    def robust_at(self, clean: ArrayLike) -> NDArray[np.float64]:
        """The robust accuracy the control reaches at these clean accuracies; NaN outside the measured range."""
        corners = self.corners
        return self._at(clean, self.clean, corners[1][::-1], corners[0][::-1])

    def _at(
        self, wanted: ArrayLike, measured: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        wanted = np.asarray(wanted, np.float64)
        if len(measured) < MIN_POINTS:
            return np.full(wanted.shape, np.nan)
        inside = (wanted >= measured.min()) & (wanted <= measured.max())
        return np.where(inside, np.interp(wanted, x, y), np.nan)


def gap(
    robust: ArrayLike, clean: ArrayLike, frontiers: Sequence[Frontier], axis: Axis = "clean"
) -> NDArray[np.float64]:
    """Distance above the higher frontier: clean accuracy at equal robust (the headline), or the other way round.

    Args:
        robust: robust accuracies ``[P]`` of the points that are compared.
        clean: their clean accuracies ``[P]``.
        frontiers: the controls; at each point the highest of those whose measured range covers it decides.
        axis: ``"clean"`` (clean accuracy at equal robust accuracy) or ``"robust"`` (robust at equal clean).

    Returns:
        float64 ``[P]``, positive = better than the controls; NaN where no frontier reaches (not comparable).

    >>> control = Frontier("uniform-eps", [0.2, 0.4], [0.9, 0.7])
    >>> gap([0.3, 0.5], [0.85, 0.85], [control]).round(3)
    array([0.05,  nan])
    """
    robust, clean = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
    reached = [line.clean_at(robust) if axis == "clean" else line.robust_at(clean) for line in frontiers]
    best: NDArray[np.float64] = np.fmax.reduce([np.full(robust.shape, np.nan), *reached])
    return (clean if axis == "clean" else robust) - best


def why_not(robust: float, clean: float, frontiers: Sequence[Frontier], axis: Axis = "clean") -> str:
    """The reason a point cannot be compared; empty if it can."""
    if not np.isnan(gap(robust, clean, frontiers, axis)):
        return ""
    usable = [frontier for frontier in frontiers if len(frontier.robust) >= MIN_POINTS]
    if not usable:
        return f"not comparable: no control frontier of at least {MIN_POINTS} points"
    other: Axis = "robust" if axis == "clean" else "clean"
    value = robust if axis == "clean" else clean
    if np.isnan(value):
        return f"not comparable: no {other} accuracy"
    ranges = [getattr(frontier, other) for frontier in usable]
    low, high = min(points.min() for points in ranges), max(points.max() for points in ranges)
    side = "above" if value > high else "below" if value < low else "between"
    return f"not comparable: {other} accuracy {value:.3f} is {side} what the controls reach ({low:.3f} to {high:.3f})"
