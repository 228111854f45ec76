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

import math
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf, ndtr, ndtri, owens_t

from puma.errors import DataError, UsageError, unknown
from puma.strategies.rules import automatic_c

Array = NDArray[np.float64]

_SLACK = 1e-12  # how far beyond its range an argument may lie by rounding; it is clipped
_NODES = 64
_TAIL = 9.0  # standard deviations beyond which a normal has no mass in float64
_leggauss = cache(np.polynomial.legendre.leggauss)


def clean_error(R: ArrayLike) -> Array:
    """Probability that the student's label differs from the teacher's: ``arccos(R) / pi``, for ``R`` in [-1, 1].

    >>> clean_error([1.0, 0.0, -1.0]).tolist()
    [0.0, 0.5, 1.0]
    """
    return np.asarray(np.arccos(within("R", R, -1, 1)) / np.pi)


def robust_error(R: ArrayLike, eps: ArrayLike, definition: Literal["fixed", "moved"] = "fixed") -> Array:
    """Probability that an L2 attack with ``eps`` (not negative) on a student of overlap ``R`` succeeds.

    ``"fixed"``: the label stays that of the clean ``x``, as in adversarial training and AutoAttack. The attack succeeds
    iff ``y v < eps``; ``y v`` is skew-normal with shape ``k = R / sqrt(1 - R^2)``, so the error is
    ``Phi(eps) - 2 T(eps, k)``. What is left at ``R = 1`` is `mislabelled_share`.

    ``"moved"``: the label moves with ``x``: some point of the ball is labelled differently by student and teacher,
    ``1 - 2 P(u > eps, v > eps) = 1 - 2 Phi(-eps) + 4 T(eps, tan(theta / 2))``. It tends to `mislabelled_share` as
    ``theta`` falls to 0, but is 0 at ``theta = 0``: useless for ranking.

    >>> robust_error(1.0, [0.1, 0.3, 0.5]).round(3).tolist()
    [0.08, 0.236, 0.383]
    """
    R, eps = within("R", R, -1, 1), within("eps", eps, 0, np.inf)
    if definition == "fixed":
        return np.asarray(np.clip(ndtr(eps) - 2 * owens_t(eps, _cotangent(R)), 0.0, 1.0))
    if definition == "moved":
        tan_half = divide(np.sqrt(1 - R), np.sqrt(1 + R))
        error = 1 - 2 * ndtr(-eps) + 4 * owens_t(eps, tan_half)
        return np.where(R == 1, 0.0, np.clip(error, 0.0, 1.0))
    raise unknown("definition", definition, ("fixed", "moved"))


def capped_robust_error(R: ArrayLike, eps: ArrayLike, c: ArrayLike) -> Array:
    """Robust error when each example is attacked with ``min(eps, c s)``, ``s`` its distance to the teacher.

    With ``c < 1`` no attack crosses the teacher's boundary ("label-consistent"); ``c = 0`` gives the clean error,
    ``c = inf`` the fixed robust error. The cap spares the triangle ``{c s < y v < eps}``: with
    ``s = R y v + sqrt(1 - R^2) t`` and ``t`` independent of ``y v``, it is ``0 < y v < eps``, ``-k y v < t < q y v``
    with ``k = R / sqrt(1 - R^2)``, ``q = (1/c - R) / sqrt(1 - R^2)``. So the error is
    ``robust_error - 2 [wedge(eps, q) + wedge(eps, k) - (Phi(eps) - 1/2)]``.

    >>> capped_robust_error(0.98, 0.3, [0.0, 0.5, np.inf]).round(4).tolist()
    [0.0638, 0.1212, 0.2405]
    """
    R, eps, c = within("R", R, -1, 1), within("eps", eps, 0, np.inf), within("c", c, 0, np.inf)
    fixed = robust_error(R, eps)
    q = divide(divide(1.0, c) - R, np.sqrt((1 - R) * (1 + R)))
    spared = wedge(eps, q) + wedge(eps, _cotangent(R)) - (ndtr(eps) - 0.5)
    error = np.clip(fixed - 2 * spared, 0.0, 1.0)
    return np.where((R == 1) & (c <= 1), 0.0, error)


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
    angle (radians in [0, pi]) the kept slab is ``|v0| < tau``, ``2 Phi(tau) - 1 = keep`` (``|v0| > tau`` for the low
    end); the mean of ``P(|u| < eps | v0)`` over it keeps its digits as ``keep`` falls to 0.

    >>> mislabelled_share_after_pruning(0.3, 0.4, probe_angle=np.radians([0, 10, 20, 40])).round(3).tolist()
    [0.59, 0.575, 0.491, 0.339]
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

    def inside(eps: Array, v0: Array, rho: Array, sine: Array) -> Array:  # P(|u| < eps | v0), u ~ N(rho v0, sine^2)
        return np.asarray(ndtr(divide(eps - rho * v0, sine)) - ndtr(divide(-eps - rho * v0, sine)))

    # P(|u| < eps | v0) falls around v0 = eps / rho, over a width of sine / rho
    edges = [divide(eps + side * _TAIL * sine, rho) for side in (-1, 1)]
    v0, weight = panels(np.stack([low, *(np.clip(edge, low, high) for edge in edges), high], axis=-1), _NODES)
    density = weight * np.exp(-(v0**2 - low[..., None] ** 2) / 2)
    total = density.sum(-1)
    mean = divide((density * inside(eps[..., None], v0, rho[..., None], sine[..., None])).sum(-1), total)
    mean = np.where(total > 0, mean, inside(eps, low, rho, sine))  # the limit: an infinitely thin slab
    return np.where(sine < 1e-15, perfect, np.clip(mean, 0.0, 1.0))


def residual_mislabelled_mass(c: ArrayLike, probe_angle: ArrayLike, eps: ArrayLike = np.inf) -> Array:
    """Share of examples that the *capped* attack ``min(eps, c max(m, 0))`` still mislabels, ``m = y v0``.

    It crosses the teacher iff ``s < c m``. With ``t = probe_angle`` and ``eps = inf`` that is the wedge
    ``cos a < c cos(a - t)`` of angles ``a`` from the teacher, of measure ``arctan2(c sin t, 1 - c cos t) / pi``: close
    to the probe's clean error times ``c / (1 - c)`` for a good probe and ``c < 1``; ``1/2 - t / 2 pi`` at ``c = 1``. A
    finite ``eps`` asks for ``s < eps`` too: ``2 [Phi(eps) - 1/2 - wedge(eps, q)]``, ``q = (1/c - cos t) / sin t``.

    >>> residual_mislabelled_mass([0.25, 0.5, 1.0], np.radians(10)).round(4).tolist()
    [0.0183, 0.0539, 0.4722]
    """
    c, angle = within("c", c, 0, np.inf), within("probe_angle", probe_angle, 0, np.pi)
    eps = within("eps", eps, 0, np.inf)
    finite = np.minimum(c, 1e300)  # inf * 0 is no angle
    unlimited = np.arctan2(finite * np.sin(angle), 1 - finite * np.cos(angle)) / np.pi
    q = divide(divide(1.0, c) - np.cos(angle), np.sin(angle))
    limited = 2 * (ndtr(eps) - 0.5 - wedge(eps, q))
    limited = np.where((np.sin(angle) < 1e-15) & (c <= 1), 0.0, np.clip(limited, 0.0, 1.0))
    return np.asarray(np.where(np.isinf(eps), unlimited, np.minimum(limited, unlimited)))


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


def bridge(margin: ArrayLike, eps: float, keep_fraction: float) -> dict[str, float]:
    """Theory of the linear two-class student for pruning a real margin table: a compass, no law.

    The share ``f = keep_fraction``, in (0, 1], of lowest margins is kept, without quotas. ``margin`` ``[N]`` is signed,
    in the norm of ``eps``; NaN rows are left out (`DataError` if none is left), -inf is misclassified. The formulas are
    this project's, read off the closed forms and grids of the docs page "perceptron".

    Returns:
        ``rows`` with a margin and ``kept`` ones; ``misclassified`` (``err``), the share with a margin below 0;
        ``below_eps`` (``p``), the share from 0 to ``eps``; ``mislabelled_after_pruning``, ``min(1, p / f)``; ``c``, the
        suggested cap (`puma.strategies.rules.automatic_c`); ``residual_mislabelled``, ``err c / ((1 - c) f)`` among the
        kept rows under it; ``safe_prune_fraction`` with the cap (``1 - 4 err``) and ``..._uncapped`` (``1 - 2.5 p``);
        ``mean_margin`` over the kept rows (a -inf counts as the lowest finite margin); ``mean_eps``, of
        ``min(eps, c max(margin, 0))``; ``collapse_margin``, their difference, and ``..._uncapped``, ``mean_margin -
        eps``: at or below 0 the theory predicts collapse.

    >>> facts = bridge([-0.01, 0.01, 0.02, 0.05, 0.06], eps=0.03, keep_fraction=0.6)
    >>> round(facts["misclassified"], 2), round(facts["below_eps"], 2), round(facts["c"], 3)
    (0.2, 0.4, 0.545)
    >>> facts["collapse_margin_uncapped"] < 0 < facts["collapse_margin"]
    True
    """
    eps = float(within("eps", eps, 0, np.finfo(float).max))
    keep = float(within("keep_fraction", keep_fraction, 0, 1))
    if keep == 0:
        raise UsageError("keep_fraction is 0", why="nothing would be left to train on")
    margins = np.asarray(margin, np.float64).ravel()
    margins = np.sort(margins[~np.isnan(margins)])
    if not len(margins):
        raise DataError("no row has a margin", fix="score the pool again, or look at its statuses with `puma show`")
    kept = max(1, math.floor(keep * len(margins) + 0.5))
    err, below = float(np.mean(margins < 0)), float(np.mean((margins > 0) & (margins < eps)))
    c, lower = automatic_c(err, below, keep), margins[:kept]
    lowest = float(next(iter(margins[np.isfinite(margins)]), 0.0))
    mean_margin = float(np.where(np.isfinite(lower), lower, np.sign(lower) * abs(lowest)).mean())
    mean_eps = float(np.minimum(eps, c * np.maximum(lower, 0)).mean())
    return {
        "rows": len(margins),
        "kept": kept,
        "misclassified": err,
        "below_eps": below,
        "mislabelled_after_pruning": min(1.0, below / keep),
        "c": c,
        "residual_mislabelled": min(1.0, err * c / ((1 - c) * keep)),
        "safe_prune_fraction": max(0.0, 1 - 4 * err),
        "safe_prune_fraction_uncapped": max(0.0, 1 - 2.5 * below),
        "mean_margin": mean_margin,
        "mean_eps": mean_eps,
        "collapse_margin": mean_margin - mean_eps,
        "collapse_margin_uncapped": mean_margin - eps,
    }


def wedge(h: ArrayLike, slope: ArrayLike) -> Array:
    """``P(0 < a < h, b < slope * a)`` of two independent standard normals ``a, b``, for ``h >= 0``.

    Half the skew-normal distribution function, ``Phi(h)/2 - T(h, k)``, less its value ``1/4 - arctan(k)/2pi`` at 0.
    """
    h, slope = np.asarray(h, np.float64), np.asarray(slope, np.float64)
    return np.asarray(ndtr(h) / 2 - 0.25 - owens_t(h, slope) + np.arctan(slope) / (2 * np.pi))


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


def _cotangent(R: Array) -> Array:
    """``R / sqrt(1 - R^2)``, without cancellation near +-1."""
    return divide(R, np.sqrt((1 - R) * (1 + R)))
