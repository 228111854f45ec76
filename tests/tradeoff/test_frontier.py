"""Control frontiers and gaps against point sets with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puma.errors import UsageError
from puma.tradeoff import Frontier, gap, why_not

EPS = Frontier("uniform-eps", [0.2, 0.3, 0.5], [0.9, 0.85, 0.65])
BETA = Frontier("trades-beta", [0.25, 0.45], [0.95, 0.6])


def test_on_the_line_and_at_its_ends() -> None:
    np.testing.assert_allclose(EPS.clean_at([0.2, 0.25, 0.3, 0.4, 0.5]), [0.9, 0.875, 0.85, 0.75, 0.65])
    np.testing.assert_allclose(EPS.robust_at([0.9, 0.875, 0.85, 0.75, 0.65]), [0.2, 0.25, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("outside", [0.1999, 0.5001, math.nan, math.inf])
def test_extrapolation_is_refused(outside: float) -> None:
    assert np.isnan(EPS.clean_at(outside))


@pytest.mark.parametrize("outside", [0.6499, 0.9001])
def test_extrapolation_in_clean_accuracy_is_refused(outside: float) -> None:
    assert np.isnan(EPS.robust_at(outside))


def test_dominated_points_do_not_pull_the_frontier_down() -> None:
    bumpy = Frontier("uniform-eps", [0.2, 0.25, 0.3, 0.4, 0.5], [0.9, 0.7, 0.85, 0.6, 0.65])
    np.testing.assert_array_equal(bumpy.corners[0], [0.2, 0.3, 0.5])
    np.testing.assert_allclose(bumpy.clean_at([0.25, 0.4]), EPS.clean_at([0.25, 0.4]))


def test_ties_keep_the_better_point() -> None:
    ties = Frontier("uniform-eps", [0.3, 0.3, 0.4, 0.35, 0.4], [0.8, 0.9, 0.7, 0.7, 0.7])
    np.testing.assert_array_equal(ties.corners[0], [0.3, 0.4])
    np.testing.assert_array_equal(ties.corners[1], [0.9, 0.7])


def test_flat_below_the_least_robust_corner_as_far_as_measured() -> None:
    # the weakest setting (0.1, 0.8) is dominated: at robust 0.1 the control still reaches 0.9, with robustness to spare
    control = Frontier("uniform-eps", [0.1, 0.3, 0.5], [0.8, 0.9, 0.7])
    np.testing.assert_allclose(control.clean_at([0.1, 0.2, 0.3]), 0.9)
    assert np.isnan(control.clean_at(0.09))
    # and at clean 0.6, a setting that was measured, it reaches robust 0.5
    assert Frontier("uniform-eps", [0.3, 0.5, 0.4], [0.9, 0.7, 0.6]).robust_at(0.6) == 0.5


def test_one_point_that_dominates_all_others_is_a_flat_frontier() -> None:
    control = Frontier("uniform-eps", [0.3, 0.4, 0.5], [0.7, 0.8, 0.9])
    np.testing.assert_allclose(control.clean_at([0.3, 0.45, 0.5]), 0.9)


@pytest.mark.parametrize("points", [[], [0.4]])
def test_too_few_points_compare_with_nothing(points: list[float]) -> None:
    few = Frontier("uniform-eps", points, points)
    assert np.isnan(few.clean_at(0.4))
    assert "at least 2 points" in why_not(0.4, 0.4, [few])


def test_broken_points_are_refused() -> None:
    with pytest.raises(UsageError, match="uniform-eps"):
        Frontier("uniform-eps", [0.1, 0.2], [0.1])
    with pytest.raises(UsageError, match="finite"):
        Frontier("uniform-eps", [0.1, math.nan], [0.1, 0.2])


def test_gap_is_to_the_higher_frontier() -> None:
    # at 0.25 the weight control (0.95) is higher than the eps control (0.875); at 0.45 the eps control (0.70) than 0.60
    np.testing.assert_allclose(gap([0.25, 0.45], [0.96, 0.75], [EPS, BETA]), [0.01, 0.05])
    # in robust accuracy at clean 0.85: eps control 0.3, weight control 0.25 + 0.2 * (0.95 - 0.85) / 0.35
    np.testing.assert_allclose(gap(0.4, 0.85, [EPS, BETA], "robust"), 0.4 - (0.25 + 0.2 * 0.1 / 0.35))


def test_gap_uses_whichever_frontier_reaches() -> None:
    np.testing.assert_allclose(gap([0.22, 0.48], [0.9, 0.7], [EPS, BETA]), [0.9 - 0.89, 0.7 - 0.67])
    assert np.isnan(gap(0.55, 0.7, [EPS, BETA]))


def test_reasons_name_the_range() -> None:
    assert why_not(0.3, 0.9, [EPS]) == ""
    assert why_not(0.55, 0.9, [EPS, BETA]) == (
        "not comparable: accuracy under attack 55.0 % is above what the controls reach (20.0 to 50.0 %)"
    )
    assert "clean accuracy 50.0 % is below" in why_not(0.3, 0.5, [EPS], "robust")
    between = [Frontier("a", [0.1, 0.2], [0.9, 0.8]), Frontier("b", [0.4, 0.5], [0.9, 0.8])]
    assert "between" in why_not(0.3, 0.9, between)
    assert "no robust accuracy" in why_not(math.nan, 0.9, [EPS])


points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=9)


@settings(deadline=None)
@given(points=points, order=st.randoms(use_true_random=False), extra=st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_frontier_bounds_its_points_and_ignores_their_order(
    points: list[tuple[int, int]], order: object, extra: tuple[int, int]
) -> None:
    robust, clean = (np.array(axis) / 20 for axis in zip(*points, strict=True))
    control = Frontier("control", robust, clean)
    shuffled = list(points)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    again = Frontier("control", *(np.array(axis) / 20 for axis in zip(*shuffled, strict=True)))
    grid = np.linspace(robust.min(), robust.max(), 33)
    np.testing.assert_array_equal(control.clean_at(grid), again.clean_at(grid))
    assert (gap(robust, clean, [control]) <= 1e-12).all()
    assert (gap(robust, clean, [control], "robust") <= 1e-12).all()
    assert (np.diff(control.clean_at(grid)) <= 1e-12).all()
    # one more dominated point changes nothing inside the range measured before
    worse = Frontier("control", [*robust, robust.min()], [*clean, min(extra[1] / 20, clean.max())])
    np.testing.assert_allclose(worse.clean_at(grid), control.clean_at(grid), atol=1e-12)
