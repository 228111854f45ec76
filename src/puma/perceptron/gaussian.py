"""The Gaussian integrals behind the closed forms, and the checks of their arguments.

Notation of the whole package: ``phi`` and ``Phi`` are the standard normal density and distribution function,
``T(h, a)`` is Owen's function, ``(1/2 pi) * int_0^a exp(-h^2 (1 + x^2) / 2) / (1 + x^2) dx``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, owens_t

from puma.errors import UsageError

Array = NDArray[np.float64]

SLACK = 1e-12
"""How far beyond its range an argument may lie by rounding; it is clipped."""


def within(name: str, value: ArrayLike, low: float, high: float) -> Array:
    """``value`` as float64, clipped to ``[low, high]``.

    Raises:
        UsageError: it is NaN, or outside by more than rounding.
    """
    array = np.asarray(value, dtype=np.float64)
    if not np.all((array >= low - SLACK) & (array <= high + SLACK)):
        raise UsageError(f"{name} is {value!r}", why=f"it has to lie between {low:g} and {high:g}")
    return np.clip(array, low, high)


def divide(top: ArrayLike, bottom: ArrayLike) -> Array:
    """``top / bottom`` without warnings: +-inf where only ``bottom`` is 0, and 0 where both are."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.asarray(np.divide(top, bottom))
    return np.where(np.isnan(ratio), 0.0, ratio)


def wedge(h: ArrayLike, slope: ArrayLike) -> Array:
    """``P(0 < a < h, b < slope * a)`` of two independent standard normals ``a, b``, for ``h >= 0``.

    It is ``int_0^h phi(a) Phi(slope * a) da``. From ``int_-inf^h phi(a) Phi(k a) da = Phi(h)/2 - T(h, k)`` (half the
    skew-normal distribution function) and its value ``1/4 - arctan(k)/2pi`` at 0.

    >>> float(wedge(np.inf, 0.0))
    0.25
    """
    h, slope = np.asarray(h, np.float64), np.asarray(slope, np.float64)
    return np.asarray(ndtr(h) / 2 - 0.25 - owens_t(h, slope) + np.arctan(slope) / (2 * np.pi))


@cache
def legendre(count: int) -> tuple[Array, Array]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def panels(breaks: ArrayLike, count: int) -> tuple[Array, Array]:
    """A Gauss-Legendre rule of ``count`` nodes between each two neighbours of ``breaks`` ``[..., K]``.

    Returns:
        Nodes and weights, both ``[..., (K - 1) * count]``; panels of no width have weight 0.
    """
    breaks = np.asarray(breaks, np.float64)
    low, width = breaks[..., :-1, None], np.diff(breaks)[..., None]
    nodes, weights = legendre(count)
    shape = (*breaks.shape[:-1], -1)
    return (low + width * nodes).reshape(shape), (width * weights).reshape(shape)
