"""What a free dial reaches in the plane of robust and clean accuracy.

A control dial (a smaller uniform eps, another TRADES weight) gives a few measured points. Its **frontier** is made of
those that no other of them beats in both accuracies, joined by straight lines: nobody would choose a dominated setting
of a dial, and a setting between two neighbours reaches about what lies between them. Measured points are noisy, so
that in the order of the dial they need not be monotone; leaving out the dominated ones makes the frontier falling, and
errs on the side of the control.

At a robust accuracy below that of the least robust undominated point the frontier is flat (the dial reaches that clean
accuracy with robustness to spare), as far down as a point was measured. Beyond the measured range it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.errors import UsageError

MIN_POINTS = 2


@dataclass(frozen=True)
class Frontier:
    """The measured points of one dial.

    Args:
        name: ``"uniform-eps"`` or ``"trades-weight"``.
        robust: robust accuracies ``[P]``, in any order.
        clean: clean accuracies ``[P]`` of the same runs.

    >>> dial = Frontier("uniform-eps", [0.2, 0.4, 0.3], [0.9, 0.7, 0.6])
    >>> dial.corners
    (array([0.2, 0.4]), array([0.9, 0.7]))
    >>> dial.clean_at([0.3, 0.5])
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
        """The clean accuracy the dial reaches at these robust accuracies; NaN outside the measured range."""
        return self._at(robust, self.robust, *self.corners)

    def robust_at(self, clean: ArrayLike) -> NDArray[np.float64]:
        """The robust accuracy the dial reaches at these clean accuracies; NaN outside the measured range."""
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
