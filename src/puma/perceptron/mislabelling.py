"""How many training examples the attack mislabels, before and after pruning, with and without the cap.

Adversarial training keeps the label while it moves ``x``. If the move crosses the teacher's boundary, the label is
wrong for the point that is trained on. With ``s = |w*.x|`` and a student that points the right way, this happens iff
``s < eps``. A probe (the margin model of the real method) is a unit vector ``w0`` at ``probe_angle`` from the teacher;
``v0 = w0.x`` has correlation ``cos(probe_angle)`` with ``u = w*.x``. Definitions and their checks: the docs page
"perceptron".
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erf, ndtr, ndtri

from puma.errors import unknown
from puma.perceptron.gaussian import Array, divide, panels, wedge, within

End = Literal["high", "low"]

_NODES = 64
_TAIL = 9.0
"""Standard deviations beyond which a normal has no mass in float64."""


def mislabelled_share(eps: ArrayLike) -> Array:
    """Share of examples that an attack of norm ``eps`` moves across the teacher: ``P(s < eps) = erf(eps / sqrt 2)``.

    >>> mislabelled_share([0.1, 0.3, 0.5]).round(3).tolist()
    [0.08, 0.236, 0.383]

    Raises:
        UsageError: a negative ``eps``.
    """
    return np.asarray(erf(within("eps", eps, 0, np.inf) / np.sqrt(2)))


def mislabelled_share_after_pruning(
    eps: ArrayLike, keep: ArrayLike, end: End = "high", probe_angle: ArrayLike = 0.0
) -> Array:
    """Share of the *kept* examples that the attack mislabels, when the probe's margins ``|v0|`` decide who is kept.

    With a perfect probe pruning the high end gives ``min(1, p / keep)`` and pruning the low end
    ``max(0, (p - (1 - keep)) / keep)``, where ``p`` is `mislabelled_share`: pruning easy examples concentrates the
    mislabelled ones, pruning difficult ones removes them first, random pruning leaves ``p``. With a probe at an angle
    the kept slab is ``|v0| < tau``, ``2 Phi(tau) - 1 = keep`` (``|v0| > tau`` for the low end), and the share is
    ``P(|u| < eps, kept) / keep``, a rectangle of the bivariate normal. It is computed as the mean over the slab of
    ``P(|u| < eps | v0)``, which keeps its digits as ``keep`` falls to 0.

    Args:
        eps: attack norm, not negative.
        keep: kept share in [0, 1]; 0 gives the limit.
        end: the end that is pruned: ``"high"`` (PE, the easy examples) or ``"low"`` (PD, the difficult ones).
        probe_angle: radians in [0, pi]. All but ``end`` broadcast.

    >>> mislabelled_share_after_pruning(0.3, 0.4, probe_angle=np.radians([0, 10, 20, 40])).round(3).tolist()
    [0.59, 0.575, 0.491, 0.339]

    Raises:
        UsageError: a value out of its range, or another ``end``.
    """
    if end not in ("high", "low"):
        raise unknown("end", end, ("high", "low"))
    eps, keep, angle = np.broadcast_arrays(
        within("eps", eps, 0, np.inf), within("keep", keep, 0, 1), within("probe_angle", probe_angle, 0, np.pi)
    )
    share = mislabelled_share(eps)
    if end == "high":
        perfect = np.where(eps == 0, 0.0, np.minimum(1.0, divide(share, keep)))
        tau = ndtri((1 + keep) / 2)
        low, high = np.zeros_like(tau), np.minimum(tau, _TAIL)
    else:
        perfect = np.where(keep == 0, 0.0, np.clip(divide(share - (1 - keep), keep), 0.0, 1.0))
        perfect = np.where(np.isinf(eps), 1.0, perfect)
        tau = -ndtri(keep / 2)
        low = np.minimum(tau, 38.0)  # beyond, the density underflows
        high = np.sqrt(low**2 + 80)  # exp(-40) of the density at low
    rho, sine = np.abs(np.cos(angle)), np.sin(angle)
    # P(|u| < eps | v0) falls around v0 = eps / rho, over a width of sine / rho
    edges = [divide(eps + side * _TAIL * sine, rho) for side in (-1, 1)]
    breaks = np.stack([low, *(np.clip(edge, low, high) for edge in edges), high], axis=-1)
    v0, weight = panels(breaks, _NODES)
    inside = _slice(eps[..., None], v0, rho[..., None], sine[..., None])
    density = weight * np.exp(-(v0**2 - low[..., None] ** 2) / 2)
    limit = _slice(eps, low, rho, sine)  # an infinitely thin slab
    total = density.sum(-1)
    mean = np.where(total > 0, divide((density * inside).sum(-1), total), limit)
    return np.where(sine < 1e-15, perfect, np.clip(mean, 0.0, 1.0))


def _slice(eps: Array, v0: Array, rho: Array, sine: Array) -> Array:
    """``P(|u| < eps | v0)``: given ``v0``, ``u`` is normal with mean ``rho v0`` and deviation ``sine``."""
    upper, lower = divide(eps - rho * v0, sine), divide(-eps - rho * v0, sine)
    return np.asarray(ndtr(upper) - ndtr(lower))


def residual_mislabelled_mass(c: ArrayLike, probe_angle: ArrayLike, eps: ArrayLike = np.inf) -> Array:
    """Share of examples that the *capped* attack ``min(eps, c max(m, 0))`` still mislabels, ``m = y v0``.

    The attack crosses the teacher iff ``s < c m``. For ``eps = inf`` this is a wedge: with ``x`` at angle ``a`` from
    the teacher, ``cos a < c cos(a - t)``, and its measure is

        ``arg(1 - c exp(-i t)) / pi = arctan2(c sin t, 1 - c cos t) / pi``.

    For a good probe and ``c < 1`` it is close to ``(t / pi) c / (1 - c)``, the probe's clean error times
    ``c / (1 - c)``: **at c = 1/2 the residual equals the probe's own clean error**. At ``c = 1`` it is
    ``1/2 - t / 2 pi``: a coin flip however good the probe (and 0 for the perfect one). A finite ``eps`` asks for
    ``s < eps`` too, and leaves ``2 [Phi(eps) - 1/2 - wedge(eps, q)]`` with ``q = (1/c - cos t) / sin t``.

    Args:
        c: the cap's factor, not negative.
        probe_angle: ``t``, radians in [0, pi].
        eps: attack norm before the cap. All broadcast.

    >>> residual_mislabelled_mass([0.25, 0.5, 1.0], np.radians(10)).round(4).tolist()
    [0.0183, 0.0539, 0.4722]
    >>> residual_mislabelled_mass([0.25, 0.5, 0.75, 1.0], np.radians(10), eps=0.3).round(3).tolist()
    [0.018, 0.052, 0.091, 0.117]

    Raises:
        UsageError: a value out of its range.
    """
    c, angle = within("c", c, 0, np.inf), within("probe_angle", probe_angle, 0, np.pi)
    eps = within("eps", eps, 0, np.inf)
    finite = np.minimum(c, 1e300)  # inf * 0 is no angle
    whole = np.arctan2(finite * np.sin(angle), 1 - finite * np.cos(angle)) / np.pi
    q = divide(divide(1.0, c) - np.cos(angle), np.sin(angle))
    part = 2 * (ndtr(eps) - 0.5 - wedge(eps, q))
    part = np.where((np.sin(angle) < 1e-15) & (c <= 1), 0.0, np.clip(part, 0.0, 1.0))
    return np.asarray(np.where(np.isinf(eps), whole, np.minimum(part, whole)))


def collapse_fraction(eps: ArrayLike) -> Array:
    """The kept share below which adversarial training on easy-pruned data collapses to ``w = 0``.

    ``w = 0`` minimises the adversarial loss iff ``|mean(y x)| <= mean(eps_i)`` (see `fit`). When the high end is pruned
    by a perfect probe, with unlimited data, ``mean(y x)`` points along the teacher and is the mean of a half-normal cut
    at ``tau``: ``sqrt(2/pi) (1 - exp(-tau^2/2)) / keep`` with ``keep = erf(tau / sqrt 2)``. It grows with ``tau``;
    where it equals ``eps`` lies the critical share. There about half of the kept examples are mislabelled by the
    attack: ``collapse_fraction(eps)`` is close to ``2 mislabelled_share(eps)``.

    With ``n`` examples in ``d`` dimensions noise lengthens the mean: the condition is
    ``sqrt(mean^2 + d / (keep n)) <= eps``, so exact collapse needs ``keep n / d > 1 / eps^2``.

    Args:
        eps: attack norm, not negative, any shape. From ``sqrt(2/pi)`` on, training collapses on all data: 1.

    >>> collapse_fraction([0.0, 0.1, 0.3, 0.5, 1.0]).round(3).tolist()
    [0.0, 0.159, 0.464, 0.732, 1.0]

    Raises:
        UsageError: a negative ``eps``.
    """
    eps = within("eps", eps, 0, np.inf)
    low, high = 2 * np.minimum(eps, 1.0), np.full_like(eps, 40.0)  # the mean is below tau / 2: the density falls
    for _ in range(110):
        tau = (low + high) / 2
        above = _truncated_mean(tau) > eps
        low, high = np.where(above, low, tau), np.where(above, tau, high)
    return np.where(eps >= np.sqrt(2 / np.pi), 1.0, erf(low / np.sqrt(2)))


def _truncated_mean(tau: Array) -> Array:
    """Mean of a half-normal variable below ``tau``."""
    return divide(-np.expm1(-(tau**2) / 2) * np.sqrt(2 / np.pi), erf(tau / np.sqrt(2)))
