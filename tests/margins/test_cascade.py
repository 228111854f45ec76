"""Estimates everywhere, measurements where they can change the plan."""

from __future__ import annotations

import numpy as np
import pytest
from test_scoring import Small

import puma
from puma.errors import UsageError
from puma.scoring.cascade import Cascade, score_cascade

THREAT = puma.ThreatModel("Linf", 0.02)


@pytest.fixture(scope="module")
def pool() -> puma.Pool:
    return puma.Pool([puma.load_dataset("digits")])


def test_cascade_measures_what_the_plan_depends_on(pool, tmp_path) -> None:
    model = Small(pool).eval()
    full = puma.score_margins(model, pool, batch_size=128)
    table = score_cascade(model, pool, Cascade(THREAT, 0.4, band=0.2), out=tmp_path, batch_size=128, part_rows=300)
    statuses = table.to_pandas()["status"]
    measured = (statuses == "crossed").to_numpy()
    assert 0 < measured.sum() < 0.9 * len(pool)
    assert set(statuses.unique()) == {"crossed", "estimated", "misclassified"}
    np.testing.assert_allclose(table.margin[measured], full.margin[measured], rtol=1e-2)
    reach = (full.margin > 0) & (full.margin < THREAT.eps / 0.5)
    plan, exact = (puma.make_plan(t, "puma", 0.4, threat=THREAT) for t in (table, full))
    assert measured[reach & plan.keep].all()
    assert (plan.keep != exact.keep).mean() <= 0.01
    np.testing.assert_allclose(plan.eps[plan.keep & exact.keep], exact.eps[plan.keep & exact.keep], atol=2e-4)
    assert table.meta["settings"]["measured"] == measured.sum()
    again = score_cascade(model, pool, Cascade(THREAT, 0.4, band=0.2), out=tmp_path, batch_size=128, part_rows=300)
    assert again.fingerprint == table.fingerprint


def test_a_cascade_needs_sensible_numbers() -> None:
    with pytest.raises(UsageError, match="band"):
        Cascade(THREAT, 0.3, band=1.5)
