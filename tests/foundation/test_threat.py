"""Threat models as people write them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puma.errors import UsageError
from puma.threat import Norm, ThreatModel


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Linf:8/255", "Linf:8/255"),
        ("linf:8/255", "Linf:8/255"),
        ("l_inf:0.03", "Linf:0.03"),
        ("inf: 8 / 255", "Linf:8/255"),
        ("L2:0.5", "L2:0.5"),
        ("l2:128/255", "L2:128/255"),
        ("Linf:0.2", "Linf:0.2"),
        ("Linf:0", "Linf:0"),
        ("Linf:1.5/255", "Linf:1.5/255"),
    ],
)
def test_usual_spellings_are_read_and_eps_is_shown_as_typed(text: str, shown: str) -> None:
    threat = ThreatModel.parse(text)
    assert str(threat) == shown
    assert ThreatModel.parse(threat) is threat


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("linf", "has no eps.*Linf:8/255"),
        ("l2", "has no eps.*L2:0.5"),
        ("inf", "has no eps.*Linf:8/255"),
        ("8/255", "has no norm.*Linf:8/255"),
        ("0.5", "has no norm.*Linf:0.5"),
        ("", "has no eps"),
        ("L1:8/255", "unknown norm 'L1'"),
        ("Linf:8", "8/255"),
        ("Linf:8/255/2", "as eps"),
        ("Linf:1e400", "as eps|not a number"),
        ("Linf:1e999999999", "as eps"),
        ("Linf:nan", "as eps"),
        ("Linf:-1/255", "not a number in"),
        ("Linf:1/0", "as eps"),
        ("L2:" + "9" * 100_000, "as eps"),
    ],
)
def test_others_get_the_right_hint(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){said}"):
        ThreatModel.parse(text)


@pytest.mark.parametrize("eps", [np.float32(0.5), np.float64(0.5), 1, np.int64(1)])
def test_numbers_of_numpy_are_numbers(eps: float) -> None:
    assert type(ThreatModel("L2", eps).eps) is float
    with pytest.raises(UsageError, match="not a number"):
        ThreatModel("L2", "0.5")  # type: ignore[arg-type]


@given(st.sampled_from(["Linf", "L2"]), st.floats(0, 1))
def test_a_printed_threat_model_reads_as_itself(norm: Norm, eps: float) -> None:
    for value in (eps, round(eps * 255) / 255, round(eps, 3)):
        threat = ThreatModel(norm, value)
        assert ThreatModel.parse(str(threat)) == threat
        assert len(str(threat)) <= 12 or value == eps
