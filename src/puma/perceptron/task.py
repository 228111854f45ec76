"""The linear task: its teacher, strategies on one training set, and the adversarially trained student."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import expit

from puma.errors import CheckError, DataError, UsageError, unknown
from puma.perceptron.closed_forms import Array, clean_error, robust_error
from puma.strategies import STRATEGIES
from puma.strategies.rules import automatic_c

_STEPS, _TOLERANCE = 200, 1e-11
NAMES = ("none", "random", "difficult", "easy", "puma", "puma-plus", "cap-only", "uniform-eps")
WHOLE = ("none", "cap-only", "uniform-eps")  # strategies that keep every row


@dataclass(frozen=True)
class Block:
    """Coordinates that share one standard deviation."""

    share: float  # of all coordinates
    scale: float  # their standard deviation
    signal: float  # the share of the teacher's variance that they carry


TASKS: dict[str, tuple[Block, ...]] = {
    "isotropic": (Block(share=1.0, scale=1.0, signal=1.0),),
    "anisotropic": (Block(share=0.05, scale=1.0, signal=0.7), Block(share=0.95, scale=0.2, signal=0.3)),
}


@dataclass(frozen=True)
class Task:
    """``x ~ N(0, S)`` in ``dimension`` coordinates with diagonal ``S`` constant on blocks, and ``y = sign(w*.x)``.

    ``isotropic``: one block, ``S = I``. It has no accuracy-robustness trade-off and can only show harm.
    ``anisotropic``: few strong coordinates, and many weak ones that carry part of the label. An L2 attack reaches the
    weak ones first, so a robust student has to give up their share of the label: a trade-off, as images have it. The
    teacher lies on one coordinate of each block, inside which the Gaussian has no preferred direction.

    >>> task = Task.named("anisotropic", dimension=100)
    >>> task.scale[[0, 5]].tolist(), round(float(task.teacher @ (task.scale**2 * task.teacher)), 12)
    ([1.0, 0.2], 1.0)
    """

    blocks: tuple[Block, ...]
    dimension: int

    @classmethod
    def named(cls, name: str, dimension: int) -> Task:
        """The task called ``name``, ``"isotropic"`` or ``"anisotropic"``."""
        if name not in TASKS:
            raise unknown("task", name, TASKS)
        if dimension < 20:
            raise UsageError(f"dimension {dimension} is too small", fix="use 20 coordinates or more")
        return cls(TASKS[name], dimension)

    @cached_property
    def sizes(self) -> list[int]:
        """Coordinates per block."""
        ends = np.rint(np.cumsum([block.share for block in self.blocks]) * self.dimension).astype(int)
        return [int(size) for size in np.diff(ends, prepend=0)]

    @cached_property
    def scale(self) -> Array:
        """Standard deviation of each coordinate ``[d]``."""
        return np.repeat([block.scale for block in self.blocks], self.sizes)

    @cached_property
    def teacher(self) -> Array:
        """Weights of the teacher ``[d]``, with ``w*'S w* = 1``; its L2 margin is ``|w*.x| / |w*|``."""
        weights = np.zeros(self.dimension)
        firsts = np.cumsum([0, *self.sizes[:-1]])
        weights[firsts] = [np.sqrt(block.signal) / block.scale for block in self.blocks]
        return weights

    def sample(self, rows: int, rng: np.random.Generator) -> Array:
        """``rows`` examples as label times input ``[rows, d]``; more rows of one seed begin with the fewer."""
        x = rng.standard_normal((rows, self.dimension)) * self.scale
        return x * np.sign(x @ self.teacher)[:, None]

    def overlap(self, weights: Array) -> float:
        """Correlation of student and teacher outputs, in [-1, 1]; NaN for a student of no length."""
        length = float(np.linalg.norm(self.scale * weights))
        return float(np.clip(weights @ (self.scale**2 * self.teacher) / length, -1, 1)) if length else math.nan

    def errors(self, weights: Array, eps: float) -> dict[str, float]:
        """The errors of a student ``weights`` ``[d]``, see `errors_at`."""
        length, unit = float(np.linalg.norm(weights)), float(np.linalg.norm(self.scale * weights))
        # in units of the student's output, eps grows by |w| / |w|_S
        return errors_at(self.overlap(weights), eps * length / unit if length else eps)


def errors_at(overlap: float, eps: float) -> dict[str, float]:
    """Exact ``clean_error`` and ``robust_error``; a student without overlap (NaN) guesses, any attack succeeds."""
    if math.isnan(overlap):
        return {"clean_error": 0.5, "robust_error": 1.0 if eps > 0 else 0.5}
    return {"clean_error": float(clean_error(overlap)), "robust_error": float(robust_error(overlap, eps))}


@dataclass(frozen=True)
class Strategy:
    """A strategy with its parameters: names, rules and defaults of `puma.strategies`, without classes and sources.

    ``puma(c)``, ``puma-plus(c, max_misclassified)`` (``c`` may be ``auto``), ``cap-only(c)``, ``uniform-eps(scale)``.

    >>> Strategy.parse("puma-plus(0.5)")
    Strategy(name='puma-plus', parameters=(0.5, 0.2))
    """

    name: str
    parameters: tuple[float | str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Read ``name`` or ``name(parameter, ...)``; what is left out takes its default."""
        match = re.fullmatch(r"\s*([a-z-]+)\s*(?:\((.*)\))?\s*", text)
        if match is None or match[1] not in NAMES:
            raise unknown("strategy", match[1] if match else text, NAMES)
        defaults = [value for value in STRATEGIES[match[1]].parameters.values() if value is not None]
        given = [part.strip() for part in match[2].split(",")] if match[2] else []
        try:
            values = [one if part == one == "auto" else float(part) for part, one in zip(given, defaults, strict=False)]
            sound = len(given) <= len(defaults) and all(v == "auto" or 0 <= v < math.inf for v in values)
        except ValueError:
            sound = False
        if not sound:
            why = f"{match[1]} takes {len(defaults)}, numbers that are not negative, or auto for the c of puma-plus"
            raise UsageError(f"strategy {text!r} has parameters that cannot be used", why=why)
        return cls(match[1], (*values, *defaults[len(given) :]))

    def cap(self, misclassified: float, below_eps: float, keep: float) -> float:
        """The factor ``c`` of the cap, from three shares (margin below 0, from 0 to eps, kept); inf without a cap."""
        c = self.parameters[0] if self.name in ("puma", "puma-plus", "cap-only") else math.inf
        return automatic_c(misclassified, below_eps, keep) if isinstance(c, str) else c

    def select(
        self, margin: Array, eps: float, keep: float, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], Array]:
        """Indices of the kept rows, ascending, and their eps, from signed margins ``[n]`` to the probe."""
        n = len(margin)
        kept = n if self.name in WHOLE else max(1, round(keep * n))
        start = n - kept if self.name == "difficult" else 0
        if self.name == "puma-plus":  # the most negative rows beyond its share go first, never beyond the budget
            allowed = int(float(self.parameters[1]) * kept)
            start = min(n - kept, max(0, int((margin < 0).sum()) - allowed))
        order = rng.permutation(n) if self.name == "random" else np.argsort(margin, kind="stable")
        rows = np.sort(order[start : start + kept])
        c = self.cap(float(np.mean(margin < 0)), float(np.mean((margin > 0) & (margin < eps))), kept / n)
        return rows, self.eps_of(margin[rows], eps, c)

    def eps_of(self, margin: Array, eps: float, c: float) -> Array:
        """The eps of kept rows with these margins, under a cap of factor ``c``."""
        if self.name == "uniform-eps":
            return np.full_like(margin, eps * float(self.parameters[0]))
        return np.full_like(margin, eps) if np.isinf(c) else np.minimum(eps, c * np.maximum(margin, 0))


def fit(inputs: ArrayLike, eps: ArrayLike, l2: float = 1e-5) -> Array:
    """Minimise the adversarial logistic loss of a linear student; weights ``[d]``, exactly 0 where training collapses.

    The loss is ``mean_i softplus(-(a_i.w - eps_i |w|)) + l2 |w|^2 / 2`` with ``a_i = y_i x_i``, the rows of ``inputs``
    ``[n, d]``, and ``eps`` one number or one per row: against a linear student the inner maximum over
    ``|delta| <= eps_i`` is exactly ``-eps_i |w|``. It is convex, and smooth but at ``w = 0``. There the subgradients
    are ``-mean(a_i) / 2`` plus the ball of size ``mean(eps_i) / 2``, so **w = 0 is the optimum iff
    |mean(a_i)| <= mean(eps_i)**: adversarial training has collapsed. Otherwise the loss falls along ``mean(a_i)``, and
    Newton's method with a line search runs on the smooth side until the gradient vanishes.

    >>> fit([[1.0, 0.0], [0.0, 1.0]], eps=0.8)
    array([0., 0.])

    `DataError` without rows, or for values that are not finite; `UsageError` for shapes that do not fit, a negative
    ``eps``, ``l2 <= 0`` (separable data have no optimum without it); `CheckError` without convergence.
    """
    rows, eps_i = np.ascontiguousarray(inputs, dtype=np.float64), np.asarray(eps, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0 or not np.isfinite(rows).all():
        raise DataError(f"inputs of shape {rows.shape} are not finite rows [n, d] of label times input")
    if eps_i.shape not in ((), (len(rows),)):
        raise UsageError(f"eps has shape {eps_i.shape} for {len(rows)} rows", fix="give one number or one per row")
    if not ((eps_i >= 0) & (eps_i < np.inf)).all():
        raise UsageError("eps has to be finite and not negative")
    if not (math.isfinite(l2) and l2 > 0):
        raise UsageError(f"l2 is {l2!r}", why="separable data have no optimum without a positive penalty")
    eps_i, mean = np.full(len(rows), eps_i), rows.mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length <= eps_i.mean():
        return np.zeros(rows.shape[1])
    loss = _Loss(rows, eps_i, l2)
    point = min((loss.at(size * mean / length) for size in (1.0, 0.1, 0.01)), key=lambda at: at.value)
    for _ in range(_STEPS):
        gradient, hessian = loss.derivatives(point)
        step = _newton(hessian, gradient)
        decrement, norm = float(-gradient @ step), np.linalg.norm(gradient)
        if norm <= _TOLERANCE or decrement <= 1e-26:
            return point.weights
        moved = loss.line_search(point, step, decrement)
        if moved is None:  # rounding is all that is left to gain
            if norm <= 1e-7:
                return point.weights
            break
        point = moved
    why = f"the gradient's norm is {norm:.1e}"
    raise CheckError(f"the perceptron did not converge in {_STEPS} steps", why=why, fix="raise l2")


class _Point(NamedTuple):
    """Weights, their length, the margins of the attacked rows and the loss there."""

    weights: Array
    length: float
    margins: Array
    value: float


class _Loss(NamedTuple):
    """The adversarial logistic loss of a training set."""

    rows: Array
    eps: Array
    l2: float

    def at(self, weights: Array, margins: Array | None = None) -> _Point:
        length = float(np.linalg.norm(weights))
        margins = self.rows @ weights - self.eps * length if margins is None else margins
        value = float(np.logaddexp(0, -margins).mean()) + self.l2 * length**2 / 2
        return _Point(weights, length, margins, value)

    def derivatives(self, point: _Point) -> tuple[Array, Array]:
        """Gradient ``[d]`` and Hessian ``[d, d]`` of the loss away from 0."""
        rows, eps, n, unit = self.rows, self.eps, len(self.rows), point.weights / point.length
        pull = expit(-point.margins)  # minus the loss's derivative, in (0, 1)
        spread = float(pull @ eps) / n
        gradient = -(rows.T @ pull) / n + spread * unit + self.l2 * point.weights
        bend = np.sqrt(pull * (1 - pull) / n)
        scaled = rows * bend[:, None]
        # sum_i bend_i^2 (a_i - eps_i unit)(a_i - eps_i unit)', multiplied out so that rows are scaled only once
        hessian = scaled.T @ scaled
        cross = scaled.T @ (bend * eps)
        square = float((bend * eps) @ (bend * eps))
        hessian -= np.outer(cross, unit) + np.outer(unit, cross)
        hessian += (square - spread / point.length) * np.outer(unit, unit)
        hessian[np.diag_indices_from(hessian)] += spread / point.length + self.l2
        return gradient, hessian

    def line_search(self, point: _Point, step: Array, decrement: float) -> _Point | None:
        """Halve the step until the loss falls enough; None if it cannot fall any more."""
        along = self.rows @ step
        for halvings in range(60):
            size = 0.5**halvings
            weights = point.weights + size * step
            length = float(np.linalg.norm(weights))
            if length > 0:
                moved = self.at(weights, point.margins + self.eps * point.length + size * along - self.eps * length)
                flat = decrement < 1e-13 and moved.value <= point.value + 1e-15 * math.fabs(point.value) + 1e-18
                if moved.value <= point.value - 1e-4 * size * decrement or flat:  # flat to rounding: trust Newton
                    return moved
        return None


def _newton(hessian: Array, gradient: Array) -> Array:
    shift = 0.0
    for _ in range(20):
        try:
            return -np.asarray(cho_solve(cho_factor(hessian + shift * np.eye(len(hessian))), gradient))
        except LinAlgError:
            shift = max(10 * shift, 1e-14 * float(np.trace(hessian)))
    raise CheckError("the perceptron's Hessian is not positive definite", fix="raise l2")
