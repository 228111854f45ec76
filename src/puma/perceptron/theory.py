"""Learning curves without simulation: the high-dimensional limit by Gordon's comparison theorem.

Let ``n, d`` grow with ``n / d = alpha`` fixed. The convex Gaussian min-max theorem (Thrampoulidis, Oymak and Hassibi
2015; for adversarial training Javanmard and Soltanolkotabi 2020, arXiv 2010.11213, and Taheri et al., arXiv 2010.13275)
replaces the Gaussian matrix of the loss by two vectors. The weights are split into the part that margins and labels
depend on (along the probe, ``b_p``, and orthogonal to it in the plane of the teacher, ``b_o``) and the rest, of length
``r``. A kept row's attacked margin is then distributed as

    ``q = b_p m + b_o o + r G - eps(m) N``,   ``N^2 = b_p^2 + b_o^2 + r^2``,   ``G ~ N(0, 1)``,

and fitting moves the training rows' margins from it by at most ``h = r / sqrt(alpha)`` in the root mean square,
``alpha`` counting kept rows. So the optimal loss is

    ``min_{b, r}  max_{g > 0}  E[ min_z softplus(-z) + (z - q)^2 / 2g ] - h^2 / 2g  +  l2 N^2 / 2``,

convex in a handful of numbers; its minimiser gives the student's overlap with the teacher, and the closed forms its
errors.

At ``d = 200`` the mean over seeds lies within 0.3 points of it (tests/perceptron), but near the collapse and with very
little data, which are marked. Students better than 1 % clean error under a cap may be off by 0.2 points (quadrature).

With unlimited data the training set is a quadrature over the probe's margins ``m = y w0.x`` (`Population`), of which
every strategy keeps an interval. With ``o`` the output orthogonal to the probe in its plane with the teacher, at angle
``t``, ``(m, o)`` are independent standard normals given ``s = cos(t) m + sin(t) o > 0``: the margin is skew-normal with
density ``2 phi(m) Phi(m / tan t)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize, root
from scipy.special import expit, ndtr, owens_t, wrightomega

from puma.errors import CheckError, UsageError
from puma.perceptron.closed_forms import Array, panels
from puma.perceptron.task import WHOLE, Strategy, errors_at

_REACH, _MARGIN_NODES = 8.0, 12
_NOISE_REACH, _NOISE_NODES = 7.5, 48
SMALLEST_ANGLE = 1e-3  # radians; better probes are computed as this one or as perfect ones
NO_MARGINS = ("none", "random", "uniform-eps")  # for these any probe will do, also one trained on the same data


@dataclass(frozen=True)
class Population:
    """The kept rows of a strategy with unlimited data, as the nodes of a quadrature."""

    angle: float  # of the probe; 0 is a perfect one
    margin: Array  # [M]
    weight: Array  # [M], without the factor P(s > 0 | m); with it they sum to 1
    eps: Array  # [M]
    keep: float

    @classmethod
    def of(cls, strategy: Strategy, eps: float, keep: float, angle: float) -> Population:
        """The population that ``strategy`` leaves."""
        if strategy.name in WHOLE:
            keep = 1.0
        if strategy.name in NO_MARGINS or angle < SMALLEST_ANGLE:
            angle = 0.0
        err = angle / np.pi
        cap = strategy.cap(err, _distribution(eps, angle) - err, keep)
        low, high = _interval(strategy, keep, angle, err)
        # panels end where eps has its knees, and where the misclassified rows end (a width of tan(angle))
        ends = [side * size * abs(np.tan(angle)) for side in (-1, 1) for size in (0.4, 1, 2.5, 8)]
        ends += [low, high, 0.0, eps / cap if cap > 0 else 0.0, 1.0, 3.0]
        nodes, weights = panels(np.unique(np.clip(ends, low, high)), _MARGIN_NODES)
        share = 1.0 if strategy.name == "random" else keep
        weights = weights * 2 * np.exp(-(nodes**2) / 2) / np.sqrt(2 * np.pi) / share
        return cls(angle, nodes, weights, strategy.eps_of(nodes, eps, cap), keep)

    @property
    def mean_eps(self) -> float:
        """Mean eps over the kept rows."""
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
    start = 1 - keep if strategy.name == "difficult" else 0.0
    if strategy.name == "puma-plus":
        start = min(1 - keep, max(0.0, err - float(strategy.parameters[1]) * keep))
    stop = 1 if strategy.name == "random" else start + keep
    return _quantile(start, angle), _quantile(stop, angle)


@dataclass(frozen=True)
class Prediction:
    """A student in the limit; fields as the columns of a simulation's table.

    ``reliable`` is False near the collapse, where ``mean_margin`` is within a tenth of ``mean_eps``, the optimum flat
    and simulations on both sides; and below 1.5 kept examples per dimension.
    """

    clean_error: float
    robust_error: float
    overlap: float
    length: float
    mean_eps: float
    mean_margin: float
    reliable: bool

    @property
    def collapsed(self) -> bool:
        """Whether the student is ``w = 0``."""
        return self.length == 0


def predict(
    strategy: str, alpha: float, eps: float, keep: float = 1.0, *, angle: float = 0.0, l2: float = 1e-5
) -> Prediction:
    """The student of `simulate` on the isotropic task in the limit of many dimensions.

    The probe is independent of the data, at ``angle`` radians from the teacher; other arguments as in `simulate`.
    `CheckError` where the saddle point was not found.

    >>> student = predict("none", alpha=10, eps=0.3)
    >>> round(student.clean_error, 3), round(student.robust_error, 3)
    (0.06, 0.239)
    """
    rule = Strategy.parse(strategy)
    if not (alpha > 0 and eps >= 0 and 0 < keep <= 1 and 0 <= angle <= math.pi / 2 and l2 > 0):
        raise UsageError(f"no prediction for alpha {alpha}, eps {eps}, keep {keep}, angle {angle}, l2 {l2}")
    population = Population.of(rule, eps, keep, angle)
    saddle = SaddlePoint(population, alpha * population.keep, l2)
    mean_margin, mean_eps = saddle.mean_margin(), population.mean_eps
    reliable = alpha * population.keep >= 1.5 and not 0.9 < mean_margin / max(mean_eps, 1e-300) < 1.1
    overlap, length = math.nan, 0.0
    if mean_margin > mean_eps:
        (along, across, _), length = saddle.parts(weights := saddle.solve()), float(np.linalg.norm(weights))
        overlap = (along * math.cos(population.angle) + across * math.sin(population.angle)) / length
    errors = errors_at(overlap, eps)
    return Prediction(
        **errors, overlap=overlap, length=length, mean_eps=mean_eps, mean_margin=mean_margin, reliable=reliable
    )


class SaddlePoint:
    """The scalar problem of one strategy at one data amount.

    Weights are a vector: ``b_p``, ``b_o`` (left out with a perfect probe, where it is 0) and the length ``r``.
    """

    def __init__(self, population: Population, alpha: float, l2: float) -> None:
        self.population, self.alpha, self.l2 = population, alpha, l2
        self.planar = population.angle > 0
        self.noise, weight = panels(np.linspace(-_NOISE_REACH, _NOISE_REACH, 5), _NOISE_NODES // 4)
        self.weight = population.weight[:, None] * (weight * np.exp(-(self.noise**2) / 2) / np.sqrt(2 * np.pi))
        self.log_g = 0.0  # the last inner maximum starts the next search

    def mean_margin(self) -> float:
        """``|mean(y x)|`` over the kept rows, with the noise that finite data add to every coordinate."""
        return math.sqrt(sum(part**2 for part in self.population.mean_margin) + 1 / self.alpha)

    def parts(self, weights: Array) -> tuple[float, float, float]:
        """``b_p, b_o, r`` of these weights."""
        return weights[0], weights[1] if self.planar else 0.0, weights[-1]

    def solve(self) -> Array:
        """The weights of the saddle point.

        The loss can be many orders of magnitude below 1 where data are separable, so its logarithm is minimised, over
        the signal and the logarithm of ``r``.
        """

        def objective(point: Array) -> tuple[float, Array]:
            weights = np.append(point[:-1], np.exp(point[-1]))
            value, gradient = self.loss(weights)
            gradient[-1] *= weights[-1]
            if value <= 0:  # rounding, far outside: no optimum is there
                return math.inf, gradient
            return math.log(value), gradient / value

        signal = 3.0 * np.array(self.population.mean_margin[: 1 + self.planar])
        point = np.append(signal, math.log(3.0 / math.sqrt(self.alpha)))
        for tolerance in (1e-3, 1e-5, 1e-7):
            point = minimize(objective, point, jac=True, method="BFGS", options={"gtol": tolerance}).x
            # the valley is flat along the overlap: only a root of the gradient fixes it to enough digits
            solution = root(lambda at: objective(at)[1], point, options={"xtol": 1e-9})
            if np.abs(solution.fun).max() < 1e-8 and objective(solution.x)[0] <= objective(point)[0] + 1e-9:
                return np.append(solution.x[:-1], np.exp(solution.x[-1]))
        raise CheckError("the saddle point was not found", why=f"the gradient is {np.abs(solution.fun).max():.1e}")

    def loss(self, weights: Array) -> tuple[float, Array]:
        """The loss after the inner maximum over ``g``, and its gradient (by the envelope theorem ``g`` is constant)."""
        (along, across, noise), length = self.parts(weights), float(np.linalg.norm(weights))
        margin, eps, spread = self.population.margin[:, None], self.population.eps[:, None], math.hypot(across, noise)
        q, weight, h = along * margin - eps * length + spread * self.noise, self.weight, noise / math.sqrt(self.alpha)
        if self.planar:
            cot = 1 / math.tan(self.population.angle)
            inside = (cot * margin * spread + across * self.noise) / noise
            weight = weight * ndtr(inside)  # P(s > 0 | m, q)
        gap, rate = self._inner(q, weight, h)  # rate = 1 / g
        envelope, force = np.logaddexp(0, -q - gap) + gap**2 * rate / 2, weight * expit(-q - gap)
        value = float(np.sum(weight * envelope)) - h**2 * rate / 2 + self.l2 * length**2 / 2
        by_spread, by_length = -float(np.sum(force * self.noise)), float(np.sum(force * eps)) + self.l2 * length
        by_across, by_noise = by_spread * across / spread, by_spread * noise / spread - h * rate / math.sqrt(self.alpha)
        if self.planar:
            edge = self.weight * np.exp(-(inside**2) / 2) / np.sqrt(2 * np.pi) * envelope
            by_across += float(np.sum(edge * (cot * margin * across / spread + self.noise))) / noise
            by_noise += float(np.sum(edge * (cot * margin * noise / spread - inside))) / noise
        by_parts = [-float(np.sum(force * margin)), *[by_across][: self.planar], by_noise]
        return value, np.array(by_parts) + by_length * weights / length

    def _inner(self, q: Array, weight: Array, h: float) -> tuple[Array, float]:
        """``z - q`` and ``1 / g`` of the inner maximum: ``E (z - q)^2 = h^2``, whose left side increases in ``g``."""
        target = math.log(max(h, 1e-300))
        log_g, low, high = self.log_g, -math.inf, math.inf
        for _ in range(80):
            gap = self._gap(q, log_g)
            square = max(float(np.sum(weight * gap**2)), 1e-300)
            miss = math.log(square) / 2 - target
            if abs(miss) < 1e-10:
                break
            low, high = (low, log_g) if miss > 0 else (log_g, high)
            # d log(z - q) / d log g = 1 / (1 + (z - q) sigmoid(z)), in (0, 1)
            slope = float(np.sum(weight * gap**2 / (1 + gap * expit(q + gap)))) / square
            step = log_g - miss / max(slope, 1e-3)
            if not low < step < high:
                step = (low + high) / 2 if math.isfinite(low + high) else log_g - math.copysign(3.0, miss)
            log_g = step
        self.log_g = log_g
        return gap, math.exp(min(-log_g, 600.0))  # a root finder astray may ask where 1 / g has no float

    def _gap(self, q: Array, log_g: float) -> Array:
        """``z - q > 0`` with ``z - q = g sigmoid(-z)``, by Newton on its logarithm, convex and from the right."""
        v = np.minimum(log_g - np.logaddexp(0, q), np.log(np.maximum(wrightomega(log_g - q), 1e-300)))
        for _ in range(50):
            gap = np.exp(v)
            z = q + gap
            step = (v - log_g + np.logaddexp(0, z)) / (1 + gap * expit(z))
            v = v - step
            if np.max(np.abs(step)) < 1e-12:
                break
        return np.asarray(np.exp(v))
