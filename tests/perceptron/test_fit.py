"""The solver against scipy, by its optimality conditions, and around the collapse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from puma.errors import DataError, UsageError
from puma.perceptron import collapse_fraction, fit


def task(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x * np.sign(x[:, :1])


def loss(w: np.ndarray, rows: np.ndarray, eps: np.ndarray, l2: float) -> float:
    """The loss straight from its definition."""
    margins = rows @ w - eps * np.linalg.norm(w)
    return float(np.logaddexp(0, -margins).mean() + l2 * (w @ w) / 2)


def gradient(w: np.ndarray, rows: np.ndarray, eps: np.ndarray, l2: float) -> np.ndarray:
    length = np.linalg.norm(w)
    pull = expit(-(rows @ w - eps * length)) / len(rows)
    return -rows.T @ pull + (pull @ eps) * w / length + l2 * w


@pytest.mark.parametrize("l2", [1e-5, 1e-2])
@pytest.mark.parametrize(("n", "d"), [(15, 30), (60, 10), (400, 10)])
@pytest.mark.parametrize("kind", ["zero", "uniform", "per row"])
def test_against_scipy(n: int, d: int, l2: float, kind: str) -> None:
    rows = task(n, d, seed=n)
    eps = {"zero": 0.0, "uniform": 0.3, "per row": np.random.default_rng(1).uniform(0, 0.6, n)}[kind]
    eps = np.broadcast_to(eps, n)
    weights = fit(rows, eps, l2)
    assert np.linalg.norm(gradient(weights, rows, eps, l2)) < 1e-9
    peer = minimize(loss, rows.mean(0), (rows, eps, l2), jac=gradient, method="BFGS", options={"gtol": 1e-9})
    assert loss(weights, rows, eps, l2) <= peer.fun + 1e-12
    assert peer.fun == pytest.approx(loss(weights, rows, eps, l2), abs=1e-7)
    if l2 == 1e-2:  # strongly convex: the weights agree too
        np.testing.assert_allclose(weights, peer.x, atol=1e-4)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), d=st.integers(1, 12), scale=st.floats(0, 3))
@settings(max_examples=150, deadline=None)
def test_optimality_on_any_data(seed: int, n: int, d: int, scale: float) -> None:
    """Zero gradient away from 0, and exactly 0 iff the mean is no longer than the mean attack."""
    rng = np.random.default_rng(seed)
    rows, eps = rng.standard_normal((n, d)), scale * rng.uniform(size=n)
    weights = fit(rows, eps, l2=1e-3)
    collapsed = np.linalg.norm(rows.mean(0)) <= eps.mean()
    assert collapsed == (not weights.any())
    if not collapsed:
        assert np.linalg.norm(gradient(weights, rows, eps, 1e-3)) < 1e-7
        for _ in range(5):
            other = weights + rng.standard_normal(d) * rng.choice([1e-3, 0.1, 10.0])
            assert loss(weights, rows, eps, 1e-3) <= loss(other, rows, eps, 1e-3) + 1e-13


def test_no_point_is_better_than_a_collapsed_zero() -> None:
    rows, eps = task(200, 5, seed=0), np.full(200, 0.9)
    assert not fit(rows, eps).any()
    rng = np.random.default_rng(0)
    for size in (1e-6, 1e-2, 1.0):
        for _ in range(50):
            w = rng.standard_normal(5)
            assert loss(size * w / np.linalg.norm(w), rows, eps, 1e-5) >= np.log(2)


@pytest.mark.parametrize("eps", [0.2, 0.3, 0.5])
def test_collapse_is_found_where_it_is_predicted(eps: float) -> None:
    """Prune the easy end around the critical share: 100 000 examples in 4 dimensions are close to unlimited data."""
    rows = task(100_000, 4, seed=3)
    rows = rows[np.argsort(rows[:, 0])]  # the margin of a perfect probe
    critical = float(collapse_fraction(eps))
    assert fit(rows[: int(len(rows) * (critical + 0.02))], eps).any()
    assert not fit(rows[: int(len(rows) * (critical - 0.02))], eps).any()


def test_just_above_the_collapse_the_optimum_is_small_but_found() -> None:
    rows = task(500, 6, seed=5)
    limit = float(np.linalg.norm(rows.mean(0)))
    eps = np.full(500, limit * (1 - 1e-6))
    weights = fit(rows, eps, l2=1e-5)
    assert 0 < np.linalg.norm(weights) < 1e-3
    assert loss(weights, rows, eps, 1e-5) < np.log(2)
    assert not fit(rows, limit * (1 + 1e-9)).any()


def test_one_number_equals_the_same_number_for_each_row_and_order_does_not_matter() -> None:
    rows = task(80, 7, seed=2)
    weights = fit(rows, 0.2)
    np.testing.assert_array_equal(weights, fit(rows, np.full(80, 0.2)))
    order = np.random.default_rng(0).permutation(80)
    eps = np.linspace(0, 0.5, 80)
    np.testing.assert_allclose(fit(rows, eps), fit(rows[order], eps[order]), rtol=1e-6)


def test_attacked_margin_is_what_an_attacker_finds() -> None:
    """The inner maximum by search: no perturbation of norm eps costs more than ``eps |w|``."""
    rng = np.random.default_rng(0)
    w, row, eps = rng.standard_normal(3), rng.standard_normal(3), 0.4
    directions = rng.standard_normal((20_000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    worst = ((row + eps * directions) @ w).min()
    assert worst == pytest.approx(row @ w - eps * np.linalg.norm(w), abs=1e-3)
    assert worst >= row @ w - eps * np.linalg.norm(w)


@pytest.mark.parametrize(
    ("inputs", "eps", "l2", "error"),
    [
        (np.ones(3), 0.1, 1e-5, DataError),
        (np.ones((0, 3)), 0.1, 1e-5, DataError),
        (np.full((2, 2), np.nan), 0.1, 1e-5, DataError),
        (np.ones((2, 2)), -0.1, 1e-5, UsageError),
        (np.ones((2, 2)), np.inf, 1e-5, UsageError),
        (np.ones((2, 2)), [0.1, 0.2, 0.3], 1e-5, UsageError),
        (np.ones((2, 2)), 0.1, 0.0, UsageError),
    ],
)
def test_unusable_arguments_are_refused(inputs, eps, l2: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        fit(inputs, eps, l2)
