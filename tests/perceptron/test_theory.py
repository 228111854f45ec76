"""Gordon's limit against simulation, at a data set of moderate size, and by its own stationarity."""

from __future__ import annotations

import math

import numpy as np
import pytest

from puma.errors import UsageError
from puma.perceptron import clean_error, robust_error, simulate
from puma.perceptron.task import Strategy
from puma.perceptron.theory import Population, SaddlePoint, predict

ANGLE = math.radians(20)


@pytest.mark.parametrize(
    ("strategy", "alpha", "keep"),
    [
        ("none", 5, 1.0),
        ("random", 20, 0.6),
        ("difficult", 5, 0.6),
        ("easy", 20, 0.6),
        ("puma", 20, 0.6),
        ("puma-plus", 20, 0.6),
        ("uniform-eps(0.5)", 5, 1.0),
        ("cap-only", 10, 1.0),
    ],
)
def test_limit_agrees_with_simulation(strategy: str, alpha: float, keep: float) -> None:
    """Within 0.3 points plus three standard errors of the mean over seeds."""
    table = simulate(strategies=[strategy], alphas=[alpha], keeps=[keep], seeds=8, dimension=200, probe=ANGLE)
    point = predict(strategy, alpha, 0.3, keep, angle=ANGLE)
    assert point.reliable
    for name in ("clean_error", "robust_error"):
        error = table[name].std(ddof=1) / np.sqrt(len(table))
        assert abs(table[name].mean() - getattr(point, name)) < 0.003 + 3 * error, name
    assert table["mean_eps"].mean() == pytest.approx(point.mean_eps, abs=0.005)


@pytest.mark.parametrize(
    ("strategy", "angle", "weights"),
    [
        ("puma", 0.35, [3.0, 0.7, 1.1]),
        ("difficult", 0.35, [1.0, -0.2, 2.0]),
        ("easy", 0.0, [2.0, 0.7]),
    ],
)
def test_gradient_of_the_saddle_is_the_slope_of_its_value(strategy, angle, weights) -> None:
    saddle = SaddlePoint(Population.of(Strategy.parse(strategy), 0.3, 0.6, angle), 5.0, 1e-5)
    weights = np.array(weights)
    slopes = [
        (saddle.loss(weights + step)[0] - saddle.loss(weights - step)[0]) / 2e-5 for step in 1e-5 * np.eye(len(weights))
    ]
    np.testing.assert_allclose(saddle.loss(weights)[1], slopes, atol=1e-7)


def test_populations_hold_what_the_strategies_keep() -> None:
    """Mass, mean eps and mean margin of the quadrature against a large sample."""
    rng = np.random.default_rng(0)
    u, z = rng.standard_normal((2, 500_000))
    y = np.sign(u)
    margin = y * (np.cos(ANGLE) * u + np.sin(ANGLE) * z)
    beside = y * (np.sin(ANGLE) * u - np.cos(ANGLE) * z)
    for text in (
        "none",
        "random",
        "difficult",
        "easy",
        "puma",
        "puma(0.25)",
        "puma-plus",
        "puma-plus(0.5, 0)",
        "cap-only",
    ):
        strategy = Strategy.parse(text)
        rows, radii = strategy.select(margin, 0.3, 0.6, rng)
        population = Population.of(strategy, 0.3, 0.6, ANGLE)
        assert population.keep == pytest.approx(len(rows) / len(u), abs=1e-6)
        assert population.mean_eps == pytest.approx(radii.mean(), abs=2e-3), text
        found = np.hypot(margin[rows].mean(), beside[rows].mean())
        assert np.hypot(*population.mean_margin) == pytest.approx(found, abs=5e-3), text


def test_collapse_is_predicted_exactly_where_the_condition_says() -> None:
    from puma.perceptron import collapse_fraction

    critical = float(collapse_fraction(0.3))
    assert predict("easy", 1e7, 0.3, critical - 0.005).collapsed
    above = predict("easy", 1e7, 0.3, critical + 0.2)
    assert not above.collapsed
    assert above.reliable
    assert not predict("easy", 1e7, 0.3, critical + 0.005).reliable  # the marked corner
    assert not predict("none", 1, 0.3).reliable
    # noise lengthens the mean: with little data nothing collapses to exactly 0
    assert not predict("easy", 5, 0.3, critical - 0.2).collapsed
    assert predict("easy", 1e7, 0.3, critical - 0.1).robust_error == 1.0


def test_much_data_gives_the_teacher_and_its_errors() -> None:
    student = predict("none", 5000, 0.1)
    assert student.clean_error < 0.005
    assert student.clean_error == pytest.approx(float(clean_error(student.overlap)), abs=1e-12)
    assert student.robust_error == pytest.approx(float(robust_error(student.overlap, 0.1)), abs=1e-12)


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(UsageError):
        predict("none", 0, 0.3)
