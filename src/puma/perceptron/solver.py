"""Adversarial logistic regression solved to optimality: the student of the linear task."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import expit

from puma.errors import CheckError, DataError, UsageError
from puma.perceptron.closed_forms import Array

_STEPS = 200
_TOLERANCE = 1e-11


def fit(inputs: ArrayLike, eps: ArrayLike, l2: float = 1e-5) -> Array:
    """Minimise the adversarial logistic loss of a linear student.

    The loss is ``mean_i softplus(-(a_i.w - eps_i |w|)) + l2 |w|^2 / 2`` with ``a_i = y_i x_i``: against a linear
    student the inner maximum over ``|delta| <= eps_i`` is exactly ``-eps_i |w|``. It is convex, and smooth but at
    ``w = 0``. There the subgradients are ``-mean(a_i) / 2`` plus the ball of size ``mean(eps_i) / 2``, so **w = 0
    is the optimum iff |mean(a_i)| <= mean(eps_i)**: adversarial training has collapsed. Otherwise the loss falls along
    ``mean(a_i)``, and Newton's method with a line search runs on the smooth side until the gradient vanishes.

    Args:
        inputs: label times input, ``[n, d]``.
        eps: of the L2 attack, not negative: one number, or one per row ``[n]``.
        l2: weight of the penalty, positive (separable data have no optimum without it).

    Returns:
        Weights ``[d]``, float64; exactly 0 where training collapses.

    >>> fit([[1.0, 0.0], [0.0, 1.0]], eps=0.8)
    array([0., 0.])

    Raises:
        DataError: no rows, or values that are not finite.
        UsageError: shapes that do not fit, a negative ``eps``, ``l2 <= 0``.
        CheckError: no convergence.
    """
    rows, eps_i = _checked(inputs, eps, l2)
    mean = rows.mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length <= eps_i.mean():
        return np.zeros(rows.shape[1])
    point = min(
        (_Point.at(size * mean / length, rows, eps_i, l2) for size in (1.0, 0.1, 0.01)), key=lambda at: at.value
    )
    for _ in range(_STEPS):
        gradient, hessian = point.derivatives(rows, eps_i, l2)
        step = _newton(hessian, gradient)
        decrement = float(-gradient @ step)
        if np.linalg.norm(gradient) <= _TOLERANCE or decrement <= 1e-26:
            return point.weights
        moved = _line_search(point, step, decrement, rows, eps_i, l2)
        if moved is None:  # rounding is all that is left to gain
            if np.linalg.norm(gradient) <= 1e-7:
                return point.weights
            break
        point = moved
    raise CheckError(
        f"the perceptron did not converge in {_STEPS} steps",
        why=f"the gradient's norm is {np.linalg.norm(gradient):.1e}",
        fix="raise l2",
    )


@dataclass(frozen=True)
class _Point:
    """Weights, the margins of the attacked rows and the loss there."""

    weights: Array
    length: float
    margins: Array
    value: float

    @classmethod
    def at(cls, weights: Array, rows: Array, eps_i: Array, l2: float) -> _Point:
        length = float(np.linalg.norm(weights))
        margins = rows @ weights - eps_i * length
        value = float(np.logaddexp(0, -margins).mean()) + l2 * length**2 / 2
        return cls(weights, length, margins, value)

    def derivatives(self, rows: Array, eps_i: Array, l2: float) -> tuple[Array, Array]:
        """Gradient ``[d]`` and Hessian ``[d, d]`` of the loss away from 0."""
        n, unit = len(rows), self.weights / self.length
        pull = expit(-self.margins)  # minus the loss's derivative, in (0, 1)
        spread = float(pull @ eps_i) / n
        gradient = -(rows.T @ pull) / n + spread * unit + l2 * self.weights
        bend = np.sqrt(pull * (1 - pull) / n)
        scaled = rows * bend[:, None]
        # sum_i bend_i^2 (a_i - eps_i unit)(a_i - eps_i unit)', multiplied out so that rows are scaled only once
        hessian = scaled.T @ scaled
        cross = scaled.T @ (bend * eps_i)
        square = float((bend * eps_i) @ (bend * eps_i))
        hessian -= np.outer(cross, unit) + np.outer(unit, cross)
        hessian += (square - spread / self.length) * np.outer(unit, unit)
        hessian[np.diag_indices_from(hessian)] += spread / self.length + l2
        return gradient, hessian


def _newton(hessian: Array, gradient: Array) -> Array:
    """The Newton step; the Hessian is positive definite up to rounding."""
    shift = 0.0
    for _ in range(20):
        try:
            return -np.asarray(cho_solve(cho_factor(hessian + shift * np.eye(len(hessian))), gradient))
        except LinAlgError:
            shift = max(10 * shift, 1e-14 * float(np.trace(hessian)))
    raise CheckError("the perceptron's Hessian is not positive definite", fix="raise l2")


def _line_search(point: _Point, step: Array, decrement: float, rows: Array, eps_i: Array, l2: float) -> _Point | None:
    """Halve the step until the loss falls enough; None if it cannot fall any more."""
    along = rows @ step
    size = 1.0
    for _ in range(60):
        weights = point.weights + size * step
        length = float(np.linalg.norm(weights))
        if length > 0:
            margins = point.margins + eps_i * point.length + size * along - eps_i * length
            value = float(np.logaddexp(0, -margins).mean()) + l2 * length**2 / 2
            if value <= point.value - 1e-4 * size * decrement:
                return _Point(weights, length, margins, value)
            if decrement < 1e-13 and value <= point.value + 1e-15 * math.fabs(point.value) + 1e-18:
                return _Point(weights, length, margins, value)  # the loss is flat to rounding: trust Newton
        size /= 2
    return None


def _checked(inputs: ArrayLike, eps: ArrayLike, l2: float) -> tuple[Array, Array]:
    """Rows ``[n, d]`` and one eps per row ``[n]``, both float64 and valid."""
    rows = np.ascontiguousarray(inputs, dtype=np.float64)
    if rows.ndim != 2 or rows.size == 0 or not np.isfinite(rows).all():
        raise DataError(f"inputs of shape {rows.shape} are not finite rows [n, d] of label times input")
    eps_i = np.asarray(eps, dtype=np.float64)
    if eps_i.shape not in ((), (len(rows),)):
        raise UsageError(f"eps has shape {eps_i.shape} for {len(rows)} rows", fix="give one number or one per row")
    if not ((eps_i >= 0) & (eps_i < np.inf)).all():
        raise UsageError("eps has to be finite and not negative")
    if not (math.isfinite(l2) and l2 > 0):
        raise UsageError(f"l2 is {l2!r}", why="separable data have no optimum without a positive penalty")
    return rows, np.full(len(rows), eps_i)
