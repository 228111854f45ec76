"""Every closed form against Monte Carlo (stated error), against quadrature (1e-10), and at its edges."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr, owens_t
from scipy.stats import multivariate_normal, norm

from puma.errors import UsageError
from puma.perceptron import (
    clean_error,
    collapse_fraction,
    mislabelled_share,
    mislabelled_share_after_pruning,
    residual_mislabelled_mass,
    robust_error,
)

SAMPLES = 400_000
OVERLAPS = [-0.9, -0.3, 0.0, 0.5, 0.9, 0.99, 0.9999]


def sample(R: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Margins of ``SAMPLES`` examples: to the teacher (``s``), and signed to the student (``y v``)."""
    u, z = np.random.default_rng(seed).standard_normal((2, SAMPLES))
    return np.abs(u), np.sign(u) * (R * u + np.sqrt(1 - R**2) * z)


def half_normal(s: float) -> float:
    return float(np.sqrt(2 / np.pi) * np.exp(-s * s / 2))


def assert_frequency(events: np.ndarray, probability: float) -> None:
    """``events`` has the frequency ``probability`` within five standard errors of the binomial."""
    error = np.sqrt(max(probability * (1 - probability), 1e-9) / len(events))
    assert abs(events.mean() - probability) < 5 * error, (events.mean(), probability, error)


@pytest.mark.parametrize("R", OVERLAPS)
@pytest.mark.parametrize("eps", [0.05, 0.3, 1.0])
def test_errors_against_monte_carlo(R: float, eps: float) -> None:
    _, v = sample(R)
    assert_frequency(v < 0, clean_error(R))
    assert_frequency(v < eps, robust_error(R, eps))


@pytest.mark.parametrize("R", OVERLAPS)
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 1.0, 3.0])
def test_errors_against_quadrature(R: float, eps: float) -> None:
    """Integrate over ``s``: given it, ``y v`` is normal with mean ``R s``."""
    sine = np.sqrt((1 - R) * (1 + R))

    def integral(radius, start: float = 0.0) -> float:
        breaks = sorted(
            {start, *np.clip([eps / abs(R or 1), eps, eps / 4, 2 * eps, 4 * eps, 0.01, 0.1, 1.0], start, 12.0), 12.0}
        )
        return sum(
            quad(
                lambda s: np.sqrt(2 / np.pi) * np.exp(-s * s / 2) * ndtr((radius(s) - R * s) / sine),
                a,
                b,
                epsabs=1e-13,
                limit=200,
            )[0]
            for a, b in pairwise(breaks)
        )

    assert clean_error(R) == pytest.approx(integral(lambda s: 0.0), abs=1e-10)
    assert robust_error(R, eps) == pytest.approx(integral(lambda s: eps), abs=1e-10)


def test_errors_with_another_covariance() -> None:
    """The docstring's substitution: overlap in the metric of the covariance, eps scaled by ``|w| / |w|_S``."""
    rng = np.random.default_rng(2)
    scale = np.array([1.0, 0.3, 0.1])
    teacher, student = np.array([1.0, 2.0, 1.0]), np.array([2.0, 1.5, -0.4])
    x = rng.standard_normal((SAMPLES, 3)) * scale
    margin = np.sign(x @ teacher) * (x @ student) / np.linalg.norm(student)
    length = np.linalg.norm(scale * student)
    R = (scale * student) @ (scale * teacher) / length / np.linalg.norm(scale * teacher)
    assert_frequency(margin < 0.2, robust_error(R, 0.2 * np.linalg.norm(student) / length))


def test_errors_at_the_edges() -> None:
    assert clean_error([1, -1]).tolist() == [0, 1]
    eps = np.array([0.0, 0.1, 0.5, 2.0, np.inf])
    np.testing.assert_allclose(robust_error(1, eps), mislabelled_share(eps), atol=1e-15)
    np.testing.assert_allclose(robust_error(-1, eps), 1, atol=1e-15)
    np.testing.assert_allclose(robust_error(0.3, 0), clean_error(0.3), atol=1e-15)


def test_near_overlap_one_errors_lose_no_digits() -> None:
    """At eps = 0 it is theta / pi; 1 - R is exact in floating point near 1, so theta is too."""
    R = 1 - np.array([2.0**-20, 2.0**-40, 2.0**-50])
    theta = 2 * np.arcsin(np.sqrt((1 - R) / 2))
    np.testing.assert_allclose(robust_error(R, 0), theta / np.pi, atol=1e-15)


@given(R=st.floats(-1, 1), eps=st.floats(0, 6), more=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_errors_are_ordered(R: float, eps: float, more: float) -> None:
    assert clean_error(R) - 1e-12 <= robust_error(R, eps) <= robust_error(R, eps + more) + 1e-12 <= 1 + 2e-12


@pytest.mark.parametrize("angle", [0.0, 10.0, 40.0, 90.0, 140.0])
@pytest.mark.parametrize("keep", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("end", ["high", "low"])
def test_mislabelled_share_after_pruning_against_monte_carlo(angle: float, keep: float, end: str) -> None:
    u, z = np.random.default_rng(3).standard_normal((2, SAMPLES))
    v0 = np.abs(np.cos(np.radians(angle)) * u + np.sin(np.radians(angle)) * z)
    order = np.argsort(v0)
    kept = order[: round(keep * SAMPLES)] if end == "high" else order[-round(keep * SAMPLES) :]
    assert_frequency(np.abs(u[kept]) < 0.3, mislabelled_share_after_pruning(0.3, keep, end, np.radians(angle)))


@pytest.mark.parametrize("angle", [1e-6, 0.01, 0.3, 1.0, np.pi / 2, 2.5])
@pytest.mark.parametrize("keep", [1e-3, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("eps", [0.01, 0.3, 2.0])
def test_mislabelled_share_after_pruning_against_owens_formula(angle: float, keep: float, eps: float) -> None:
    """The same rectangle of the bivariate normal, by Owen's T instead of quadrature."""
    tau, rho, sine = norm.isf((1 - keep) / 2), abs(np.cos(angle)), np.sin(angle)
    inside = 1 - 2 * sum(
        owens_t(a, (b + sign * rho * a) / (a * sine)) for a, b in ((eps, tau), (tau, eps)) for sign in (-1, 1)
    )
    assert mislabelled_share_after_pruning(eps, keep, "high", angle) == pytest.approx(inside / keep, abs=1e-10)
    beyond = (
        mislabelled_share(eps)
        - (
            1
            - 2
            * sum(
                owens_t(a, (b + sign * rho * a) / (a * sine))
                for a, b in ((eps, norm.isf(keep / 2)), (norm.isf(keep / 2), eps))
                for sign in (-1, 1)
            )
        )
    ) / keep
    assert mislabelled_share_after_pruning(eps, keep, "low", angle) == pytest.approx(beyond, abs=1e-10)


def test_mislabelled_share_after_pruning_at_the_edges() -> None:
    p = float(mislabelled_share(0.3))
    assert mislabelled_share_after_pruning(0.3, [0.0, 0.1, 0.5, 1.0]) == pytest.approx([1, 1, p / 0.5, p])
    assert mislabelled_share_after_pruning(0.3, [0.0, 0.1, 0.9, 1.0], "low") == pytest.approx(
        [0, 0, (p - 0.1) / 0.9, p]
    )
    assert mislabelled_share_after_pruning(0.0, [0.0, 0.5], probe_angle=[0.0, 0.3]) == pytest.approx([0, 0])
    thin = float(mislabelled_share(0.3 / np.sin(0.2)))  # v0 = 0: u is normal with deviation sin(t)
    for keep in (0.0, 1e-300, 1e-9):
        assert mislabelled_share_after_pruning(0.3, keep, "high", 0.2) == pytest.approx(thin, abs=1e-9)
    assert mislabelled_share_after_pruning(0.3, [0.0, 1e-300], "low", 0.2) == pytest.approx([0, 0], abs=1e-10)
    for end in ("high", "low"):  # a perfect probe is the limit of good ones; at right angles margins mean nothing
        near = mislabelled_share_after_pruning(0.3, [0.2, 0.9], end, 1e-12)
        assert near == pytest.approx(mislabelled_share_after_pruning(0.3, [0.2, 0.9], end, 0.0), abs=1e-10)
        assert mislabelled_share_after_pruning(0.3, [0.01, 0.5], end, np.pi / 2) == pytest.approx(p, abs=1e-10)
        mirrored = mislabelled_share_after_pruning(0.3, 0.4, end, np.pi - 0.3)
        assert mirrored == pytest.approx(mislabelled_share_after_pruning(0.3, 0.4, end, 0.3), abs=1e-10)


@given(keep=st.floats(1e-5, 1 - 1e-9), angle=st.floats(0, np.pi), eps=st.floats(0, 5))
@settings(max_examples=200, deadline=None)
def test_kept_and_pruned_rows_add_up(keep: float, angle: float, eps: float) -> None:
    """Smaller shares are computed as these."""
    easy = mislabelled_share_after_pruning(eps, keep, "high", angle)
    hard = mislabelled_share_after_pruning(eps, 1 - keep, "low", angle)
    assert keep * easy + (1 - keep) * hard == pytest.approx(mislabelled_share(eps), abs=1e-10)


@pytest.mark.parametrize("angle", [2.0, 10.0, 40.0, 100.0])
@pytest.mark.parametrize("c", [0.25, 0.5, 1.0, 1.5])
def test_residual_mass_against_monte_carlo(angle: float, c: float) -> None:
    s, m = sample(float(np.cos(np.radians(angle))), seed=4)
    cap = c * np.maximum(m, 0)
    assert_frequency(s < cap, residual_mislabelled_mass(c, np.radians(angle)))


def test_residual_mass_at_the_edges() -> None:
    t = 1e-7
    assert residual_mislabelled_mass(0.5, t) == pytest.approx(clean_error(np.cos(0.0)) + t / np.pi, rel=1e-6)
    assert residual_mislabelled_mass([0, 0.5, 1, 2], 0.0) == pytest.approx([0, 0, 0, 1])
    assert residual_mislabelled_mass(1, 0.3) == pytest.approx(0.5 - 0.3 / (2 * np.pi), abs=1e-15)
    assert residual_mislabelled_mass(0.5, np.pi) == pytest.approx(0, abs=1e-15)
    assert residual_mislabelled_mass(np.inf, 0.3) == pytest.approx(1 - 0.3 / np.pi)  # every row with m > 0


def test_collapse_fraction_against_the_published_values_and_its_law() -> None:
    eps = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    fraction = collapse_fraction(eps)
    np.testing.assert_allclose(fraction, [0.159, 0.315, 0.464, 0.605, 0.732], atol=6e-4)
    ratio = mislabelled_share(eps) / fraction
    assert ratio.min() > 0.5
    assert ratio.max() < 0.525
    for e, f in zip(eps, fraction, strict=True):  # |mean(y x)| over the kept rows is eps, by quadrature
        mean = (
            quad(lambda s: np.sqrt(2 / np.pi) * s * np.exp(-s * s / 2), 0, norm.isf((1 - f) / 2), epsabs=1e-14)[0] / f
        )
        assert mean == pytest.approx(e, abs=1e-10)


def test_collapse_fraction_at_the_edges() -> None:
    assert collapse_fraction([0.0, np.sqrt(2 / np.pi), 1.0, np.inf]).tolist() == [0, 1, 1, 1]
    tiny = np.array([1e-3, 1e-8, 1e-100])
    np.testing.assert_allclose(collapse_fraction(tiny), mislabelled_share(2 * tiny), rtol=1e-5)
    assert (np.diff(collapse_fraction(np.linspace(0, 1, 200))) >= 0).all()


def test_shapes_broadcast_and_equal_the_loop() -> None:
    R, eps = np.linspace(-1, 1, 5)[:, None], np.array([0.0, 0.2, 1.0])
    table = robust_error(R, eps)
    assert table.shape == (5, 3)
    assert table.dtype == np.float64
    for i in range(5):
        for j in range(3):
            assert table[i, j] == robust_error(R[i, 0], eps[j])
    share = mislabelled_share_after_pruning(eps, np.array([0.1, 0.5])[:, None], "high", 0.3)
    assert share.shape == (2, 3)
    assert share[1, 2] == mislabelled_share_after_pruning(1.0, 0.5, "high", 0.3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: clean_error(1.1),
        lambda: clean_error(np.nan),
        lambda: robust_error(0.5, -0.1),
        lambda: mislabelled_share(-1),
        lambda: mislabelled_share_after_pruning(0.3, 1.5),
        lambda: mislabelled_share_after_pruning(0.3, 0.5, end="hihg"),
        lambda: mislabelled_share_after_pruning(0.3, 0.5, probe_angle=4),
        lambda: residual_mislabelled_mass(-0.5, 0.1),
        lambda: collapse_fraction(-0.1),
    ],
)
def test_values_out_of_range_are_refused(call) -> None:
    with pytest.raises(UsageError):
        call()


def test_bivariate_rectangle_against_scipy() -> None:
    t, tau = 0.4, norm.isf(0.3)
    cdf = multivariate_normal(cov=[[1, np.cos(t)], [np.cos(t), 1]]).cdf
    box = cdf([0.3, tau]) - cdf([-0.3, tau]) - cdf([0.3, -tau]) + cdf([-0.3, -tau])
    assert mislabelled_share_after_pruning(0.3, 0.4, "high", t) == pytest.approx(box / 0.4, abs=1e-6)
