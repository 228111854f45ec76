"""Closed forms of the linear task: errors of a student, and how many examples an attack mislabels.

``x ~ N(0, I_d)``, a unit teacher ``w*`` and the label ``y = sign(w*.x)``; the student is a unit vector ``w`` of overlap
``R = w.w* = cos(theta)``. ``u = w*.x`` and ``v = w.x`` are standard normals with correlation ``R``: ``s = |u|`` is
half-normal, and the student's signed margin is ``y v = R s + sqrt(1 - R^2) z`` with a standard normal ``z``.

An L2 attack with ``eps`` lowers ``y v`` by exactly ``eps``. All errors are probabilities in [0, 1] and decrease in
``R``: **the isotropic task has no accuracy-robustness trade-off**. For ``x ~ N(0, S)`` and weights of any length put
``R = w'S w* / (|w|_S |w*|_S)`` and ``eps |w| / |w|_S`` in their place, where ``|w|_S^2 = w'S w``. Where the attack
crosses the teacher's boundary, ``s < eps``, adversarial training keeps a wrong label. A probe (the margin model) is a
unit vector ``w0`` at ``probe_angle`` from the teacher; ``v0 = w0.x`` has correlation ``cos(probe_angle)`` with ``u``.

``phi``, ``Phi``: standard normal density and distribution function; ``T(h, a)``: Owen's function. Arguments broadcast;
values out of their range raise `UsageError`.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, ndtr, ndtri, owens_t

from puma.errors import UsageError, unknown

Array = NDArray[np.float64]

_SLACK = 1e-12  # how far beyond its range an argument may lie by rounding; it is clipped
_leggauss = cache(np.polynomial.legendre.leggauss)


def clean_error(R: ArrayLike) -> Array:
    """Probability that the student's label differs from the teacher's: ``arccos(R) / pi``, for ``R`` in [-1, 1].

    >>> clean_error([1.0, 0.0, -1.0]).tolist()
    [0.0, 0.5, 1.0]
    """
    return np.asarray(np.arccos(within("R", R, -1, 1)) / np.pi)


def robust_error(R: ArrayLike, eps: ArrayLike) -> Array:
    """Probability that an L2 attack with ``eps`` (not negative) on a student of overlap ``R`` succeeds.

    The label stays that of the clean ``x``, as in adversarial training and AutoAttack. The attack succeeds iff ``y v <
    eps``; ``y v`` is skew-normal with shape ``k = R / sqrt(1 - R^2)``, so the error is ``Phi(eps) - 2 T(eps, k)``. What
    is left at ``R = 1`` is `mislabelled_share`.

    >>> robust_error(1.0, [0.1, 0.3, 0.5]).round(3).tolist()
    [0.08, 0.236, 0.383]
    """
    R, eps = within("R", R, -1, 1), within("eps", eps, 0, np.inf)
    slope = divide(R, np.sqrt((1 - R) * (1 + R)))  # without cancellation near +-1
    return np.asarray(np.clip(ndtr(eps) - 2 * owens_t(eps, slope), 0.0, 1.0))


def mislabelled_share(eps: ArrayLike) -> Array:
    """Share of examples that an attack with ``eps`` moves across the teacher: ``P(s < eps) = erf(eps / sqrt 2)``.

    >>> mislabelled_share([0.1, 0.3, 0.5]).round(3).tolist()
    [0.08, 0.236, 0.383]
    """
    return np.asarray(erf(within("eps", eps, 0, np.inf) / np.sqrt(2)))


def mislabelled_share_after_pruning(
    eps: ArrayLike, keep: ArrayLike, end: Literal["high", "low"] = "high", probe_angle: ArrayLike = 0.0
) -> Array:
    """Share of the *kept* examples that the attack mislabels, when the probe's margins ``|v0|`` decide who is kept.

    ``end`` is pruned: ``"high"`` (the easy examples) or ``"low"`` (the difficult ones). With a perfect probe that gives
    ``min(1, p / keep)`` and ``max(0, (p - (1 - keep)) / keep)``, where ``p`` is `mislabelled_share`. With a probe at an
    angle (radians in [0, pi]) it follows from the rectangle ``P(|u| < eps, |v0| < tau)`` of the bivariate normal with
    ``tau`` at the end of the kept rows. A kept share below 1e-5 (``"low"``: 1e-9) is computed as that.

    >>> mislabelled_share_after_pruning(0.3, 0.4, probe_angle=np.radians([0, 10, 20, 40])).round(3).tolist()
    [0.59, 0.575, 0.491, 0.339]
    """
    if end not in ("high", "low"):
        raise unknown("end", end, ("high", "low"))
    eps, angle = within("eps", eps, 0, np.inf), within("probe_angle", probe_angle, 0, np.pi)
    keep = np.maximum(within("keep", keep, 0, 1), 1e-5 if end == "high" else 1e-9)
    tau, nearest = (ndtri((1 + keep) / 2), keep) if end == "high" else (-ndtri(keep / 2), 1 - keep)
    rho, sine, share = np.abs(np.cos(angle)), np.sin(angle), mislabelled_share(eps)
    eps, tau = np.minimum(eps, 40), np.minimum(np.abs(tau), 40)  # no normal has mass beyond
    corners = [(a, b + side * rho * a) for a, b in ((eps, tau), (tau, eps)) for side in (-1, 1)]
    inside = 1 - 2 * sum(owens_t(a, divide(top, a * sine)) for a, top in corners)
    inside = np.where(sine < 1e-15, np.minimum(share, nearest), inside)
    return np.asarray(np.clip((inside if end == "high" else share - inside) / keep, 0.0, 1.0))


def residual_mislabelled_mass(c: ArrayLike, probe_angle: ArrayLike) -> Array:
    """Share of examples that the *capped* attack ``c max(m, 0)`` still mislabels, ``m = y v0``: those with ``s < c m``.

    With ``t = probe_angle`` that is the wedge ``cos a < c cos(a - t)`` of angles ``a`` from the teacher, of measure
    ``arctan2(c sin t, 1 - c cos t) / pi``: close to the probe's clean error times ``c / (1 - c)`` for a good probe and
    ``c < 1``; ``1/2 - t / 2 pi`` at ``c = 1``.

    >>> residual_mislabelled_mass([0.25, 0.5, 1.0], np.radians(10)).round(4).tolist()
    [0.0183, 0.0539, 0.4722]
    """
    c, angle = within("c", c, 0, np.inf), within("probe_angle", probe_angle, 0, np.pi)
    c = np.minimum(c, 1e300)  # inf * 0 is no angle
    return np.asarray(np.arctan2(c * np.sin(angle), 1 - c * np.cos(angle)) / np.pi)


def collapse_fraction(eps: ArrayLike) -> Array:
    """The kept share below which adversarial training on easy-pruned data collapses to ``w = 0``; 1 from sqrt(2/pi) on.

    ``w = 0`` minimises the adversarial loss iff ``|mean(y x)| <= mean(eps_i)`` (see `fit`). With a perfect probe and
    unlimited data ``mean(y x)`` is the mean of a half-normal cut at ``tau``, ``sqrt(2/pi) (1 - exp(-tau^2/2)) / keep``
    with ``keep = erf(tau / sqrt 2)``; where it equals ``eps`` lies the critical share, close to
    ``2 mislabelled_share(eps)``. With ``n`` examples in ``d`` dimensions the condition is
    ``sqrt(mean^2 + d / (keep n)) <= eps``: exact collapse needs ``keep n / d > 1 / eps^2``.

    >>> collapse_fraction([0.0, 0.1, 0.3, 0.5, 1.0]).round(3).tolist()
    [0.0, 0.159, 0.464, 0.732, 1.0]
    """
    eps = within("eps", eps, 0, np.inf)
    low, high = 2 * np.minimum(eps, 1.0), np.full_like(eps, 40.0)  # the mean is below tau / 2: the density falls
    for _ in range(110):
        tau = (low + high) / 2
        above = divide(-np.expm1(-(tau**2) / 2) * np.sqrt(2 / np.pi), erf(tau / np.sqrt(2))) > eps
        low, high = np.where(above, low, tau), np.where(above, tau, high)
    return np.where(eps >= np.sqrt(2 / np.pi), 1.0, erf(low / np.sqrt(2)))


def within(name: str, value: ArrayLike, low: float, high: float) -> Array:
    """``value`` as float64, clipped to ``[low, high]``; NaN, or more than rounding outside, raises `UsageError`."""
    array = np.asarray(value, dtype=np.float64)
    if not np.all((array >= low - _SLACK) & (array <= high + _SLACK)):
        raise UsageError(f"{name} is {value!r}", why=f"it has to lie between {low:g} and {high:g}")
    return np.clip(array, low, high)


def divide(top: ArrayLike, bottom: ArrayLike) -> Array:
    """``top / bottom`` without warnings: +-inf where only ``bottom`` is 0, and 0 where both are."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.asarray(np.divide(top, bottom))
    return np.where(np.isnan(ratio), 0.0, ratio)


def panels(breaks: ArrayLike, count: int) -> tuple[Array, Array]:
    """A Gauss-Legendre rule of ``count`` nodes between each two neighbors of ``breaks`` ``[..., K]``.

    Nodes and weights are ``[..., (K - 1) * count]``; panels of no width have weight 0.
    """
    breaks = np.asarray(breaks, np.float64)
    low, width = breaks[..., :-1, None], np.diff(breaks)[..., None]
    nodes, weights = _leggauss(count)
    shape = (*breaks.shape[:-1], -1)
    return (low + width * ((nodes + 1) / 2)).reshape(shape), (width * (weights / 2)).reshape(shape)
