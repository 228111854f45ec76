from __future__ import annotations

import numpy as np
import pytest

from puma.errors import DataError, UsageError
from puma.perceptron import bridge, clean_error, collapse_fraction, mislabelled_share, residual_mislabelled_mass
from puma.strategies.rules import automatic_c


def margins(angle: float, rows: int = 200_000) -> np.ndarray:
    """Signed margins of a probe at ``angle`` from the teacher, on Gaussian inputs."""
    u, z = np.random.default_rng(0).standard_normal((2, rows))
    return np.sign(u) * (np.cos(angle) * u + np.sin(angle) * z)


def test_on_the_perceptrons_own_margins_it_finds_the_perceptrons_quantities() -> None:
    facts = bridge(margins(0.3), eps=0.3, keep_fraction=0.6)
    err = float(clean_error(np.cos(0.3)))
    assert facts["rows"] == 200_000
    assert facts["kept"] == 120_000
    assert facts["misclassified"] == pytest.approx(err, abs=0.004)
    assert facts["below_eps"] + facts["misclassified"] > mislabelled_share(0.3) * 0.9
    assert facts["residual_mislabelled"] == pytest.approx(err * facts["c"] / (1 - facts["c"]) / 0.6, abs=0.01)
    # the small-angle law behind it is an upper estimate of the exact wedge
    assert facts["residual_mislabelled"] * 0.6 == pytest.approx(residual_mislabelled_mass(facts["c"], 0.3), rel=0.15)
    assert facts["safe_prune_fraction"] == pytest.approx(1 - 4 * err, abs=0.02)


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.5])
def test_collapse_margin_changes_sign_at_the_collapse_fraction(eps: float) -> None:
    critical = float(collapse_fraction(eps))
    above, below = (bridge(margins(0.0), eps, critical + step) for step in (0.03, -0.03))
    assert above["collapse_margin_uncapped"] > 0 > below["collapse_margin_uncapped"]
    assert below["collapse_margin"] > 0  # the cap recovers


def test_cap_follows_the_rule_and_its_clip() -> None:
    assert automatic_c(0.12, 0.25, 0.8) == pytest.approx(0.625)
    assert automatic_c(0.5, 0.01, 0.5) == 0.25
    assert automatic_c(0.0, 0.3, 0.5) == 0.75
    assert automatic_c(0.0, 0.0, 0.5) == 0.75


def test_rows_without_margin_are_left_out_and_minus_infinity_is_misclassified() -> None:
    facts = bridge(np.array([np.nan, -np.inf, -0.2, 0.1, 0.5], np.float32), eps=0.2, keep_fraction=1.0)
    assert facts["rows"] == facts["kept"] == 4
    assert facts["misclassified"] == 0.5
    assert facts["mean_margin"] == pytest.approx((-0.2 - 0.2 + 0.1 + 0.5) / 4)
    assert all(np.isfinite(value) for value in facts.values())
    assert np.isfinite(bridge([-np.inf, -np.inf], eps=0.1, keep_fraction=0.5)["collapse_margin"])


def test_nothing_to_say_is_an_error() -> None:
    with pytest.raises(DataError, match="no row has a margin"):
        bridge([np.nan], eps=0.1, keep_fraction=0.5)
    with pytest.raises(UsageError):
        bridge([1.0], eps=0.1, keep_fraction=0.0)
    with pytest.raises(UsageError):
        bridge([1.0], eps=-0.1, keep_fraction=0.5)
