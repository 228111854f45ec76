"""The infinitely large training set of a strategy: which margins are kept, at what attack norm, as a quadrature rule.

A probe at angle ``t`` from the teacher sees the signed margin ``m = y w0.x``. With ``o`` the output along the direction
in the plane of probe and teacher that is orthogonal to the probe, the teacher's margin is ``s = cos(t) m + sin(t) o``,
and the label's sign makes ``s > 0``: ``(m, o)`` are independent standard normals given ``s > 0``. The margin is
skew-normal with density ``2 phi(m) Phi(m / tan t)``. Every strategy keeps an interval of ``m`` and sets eps from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, owens_t

from puma.perceptron.gaussian import Array, panels
from puma.perceptron.selection import WHOLE, Strategy

_REACH = 8.0
_MARGIN_NODES = 12
SMALLEST_ANGLE = 1e-3
"""Radians; better probes are computed as this one or as perfect ones."""


@dataclass(frozen=True)
class Population:
    """The kept rows of a strategy with unlimited data.

    Args:
        angle: of the probe, radians; 0 for a perfect one.
        margin: nodes ``[M]``.
        weight: their weights, without the factor ``P(s > 0 | m)``; with it they sum to 1.
        eps: attack norm at each node.
        keep: kept share.
    """

    angle: float
    margin: Array
    weight: Array
    eps: Array
    keep: float

    @classmethod
    def of(cls, strategy: Strategy, eps: float, keep: float, angle: float) -> Population:
        """The population that ``strategy`` leaves, see `selection.Strategy`."""
        if strategy.name in WHOLE:
            keep = 1.0
        if strategy.name in ("none", "random", "uniform-eps"):
            angle = 0.0  # no margins are looked at: any probe will do
        elif angle < SMALLEST_ANGLE:
            angle = 0.0
        err = angle / np.pi
        cap = strategy.cap(err, _distribution(eps, angle) - err, keep)
        low, high = _interval(strategy, keep, angle, err)
        nodes, weights = panels(_breaks(low, high, angle, eps / cap if cap > 0 else 0.0), _MARGIN_NODES)
        share = 1.0 if strategy.name == "random" else keep
        weights = weights * 2 * np.exp(-(nodes**2) / 2) / np.sqrt(2 * np.pi) / share
        if strategy.name == "uniform-eps":
            radii = np.full_like(nodes, eps * float(strategy.parameters[0]))
        elif np.isinf(cap):
            radii = np.full_like(nodes, eps)
        else:
            radii = np.minimum(eps, cap * np.maximum(nodes, 0))
        return cls(angle, nodes, weights, radii, keep)

    @property
    def mean_eps(self) -> float:
        """Mean attack norm over the kept rows."""
        return float(self._mass @ self.eps)

    @property
    def mean_margin(self) -> tuple[float, float]:
        """Means of ``m`` and ``o`` over the kept rows: ``mean(y x)`` lies in the plane of probe and teacher."""
        if self.angle == 0:
            return float(self._mass @ self.margin), 0.0
        slope = self.margin / np.tan(self.angle)
        tail = np.exp(-(slope**2) / 2) / np.sqrt(2 * np.pi)  # E[o; o > -slope]
        return float(self._mass @ self.margin), float(self.weight @ tail)

    @property
    def _mass(self) -> Array:
        if self.angle == 0:
            return self.weight
        return np.asarray(self.weight * ndtr(self.margin / np.tan(self.angle)))


def _distribution(margin: float, angle: float) -> float:
    """``P(m < margin)``: skew-normal, or half-normal for a perfect probe."""
    if angle == 0:
        return float(max(0.0, 2 * ndtr(margin) - 1))
    return float(ndtr(margin) - 2 * owens_t(margin, 1 / np.tan(angle)))


def _quantile(share: float, angle: float) -> float:
    if share <= 0:
        return 0.0 if angle == 0 else -_REACH
    if share >= 1:
        return _REACH
    return float(brentq(lambda m: _distribution(m, angle) - share, -_REACH, _REACH, xtol=1e-13))


def _interval(strategy: Strategy, keep: float, angle: float, err: float) -> tuple[float, float]:
    """Lowest and highest kept margin."""
    start = 0.0
    if strategy.name == "difficult":
        start = 1 - keep
    elif strategy.name == "puma-plus":
        start = min(1 - keep, max(0.0, err - float(strategy.parameters[1]) * keep))
    elif strategy.name == "random":
        return _quantile(0, angle), _quantile(1, angle)
    return _quantile(start, angle), _quantile(start + keep, angle)


def _breaks(low: float, high: float, angle: float, knee: float) -> Array:
    """Panel ends: where eps has its knees, and where the misclassified rows end (a width of ``tan(angle)``)."""
    width = abs(np.tan(angle))
    points = [low, high, 0.0, knee, *(side * size * width for side in (-1, 1) for size in (0.4, 1, 2.5, 8)), 1.0, 3.0]
    return np.unique(np.clip(points, low, high))
