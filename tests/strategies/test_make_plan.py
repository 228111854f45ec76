"""make_plan: quotas, protection, refusals, purity; and the plan's file."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from score_tables import EPS, PRUNING, SCORES, make_table, needed_params, tables

from puma.errors import DataError, UsageError
from puma.margins import MarginTable
from puma.plan import Plan
from puma.strategies import get_strategy, make_plan, names


@pytest.mark.parametrize("name", PRUNING)
@settings(deadline=None, max_examples=25)
@given(table=tables(), share=st.floats(0, 0.6))
def test_quotas_are_exact(name: str, table: MarginTable, share: float) -> None:
    plan = make_plan(table, name, share, threat="Linf:8/255", **needed_params(name, table))
    synthetic = table.synthetic
    prunable = synthetic if synthetic.any() else ~synthetic
    assert plan.keep[~prunable].all()
    assert (~plan.keep).sum() == np.floor(share * prunable.sum() + 0.5 + 1e-9)
    for label in range(table.num_classes):
        group = prunable & (table.label == label)
        assert abs((~plan.keep[group]).sum() - share * group.sum()) < 1


@pytest.mark.parametrize("name", names())
@settings(deadline=None, max_examples=25)
@given(table=tables(nan=True), share=st.floats(0, 0.6), balanced=st.booleans(), protect=st.booleans())
def test_eps_and_rows_without_margin(
    name: str, table: MarginTable, share: float, balanced: bool, protect: bool
) -> None:
    rules = {"class_balanced": balanced, "protect_real": protect, **needed_params(name, table)}
    try:
        plan = make_plan(table, name, share, threat="Linf:8/255", **rules)
    except DataError:
        if balanced:
            raise
        reject()  # without quotas a class may be emptied, which is refused
    strategy = get_strategy(name)
    assert (plan.eps >= 0).all()
    assert (plan.eps <= np.float32(EPS)).all()
    assert (plan.eps[~plan.keep] == 0).all()
    absent = np.isnan(table.margin)
    if "margin" in strategy.needs and name != "random-cap":
        assert plan.keep[absent].all()
    if name not in ("uniform-eps", "easy-matched", "puma-shuffled"):
        assert (plan.eps[absent & plan.keep] == np.float32(EPS)).all()


DRAWING = {"random", "random-cap", "puma-shuffled", "ccs", "dedup"}


@pytest.mark.parametrize("name", sorted(set(names()) - DRAWING))
@settings(deadline=None, max_examples=25)
@given(table=tables(), share=st.floats(0, 0.5), seed=st.integers(0, 99))
def test_order_of_the_pool_does_not_matter(name: str, table: MarginTable, share: float, seed: int) -> None:
    new_order = np.random.default_rng(seed).permutation(len(table))
    shuffled = MarginTable(
        label=table.label[new_order],
        predicted=table.predicted[new_order],
        margin=table.margin[new_order],
        status=table.status[new_order],
        steps=table.steps[new_order],
        source=table.source[new_order],
        meta=table.meta,
        scores={name: column[new_order] for name, column in table.scores.items()},
    )
    plan = make_plan(table, name, share, threat="Linf:8/255")
    again = make_plan(shuffled, name, share, threat="Linf:8/255")
    assert np.array_equal(again.keep, plan.keep[new_order])
    np.testing.assert_array_equal(again.eps, plan.eps[new_order])


@pytest.mark.parametrize("name", names())
def test_nothing_is_removed_at_zero_and_same_inputs_give_the_same_plan(name: str) -> None:
    rng = np.random.default_rng(3)
    scores = {score.replace("-", "_"): rng.random(60) for score in SCORES}
    table = make_table(rng.normal(EPS, EPS, 60), np.arange(60) % 3, real=20, **scores)
    params = needed_params(name, table)
    before = {column: getattr(table, column).copy() for column in ("margin", "label", "status", "source")}
    assert make_plan(table, name, 0, threat="Linf:8/255", **params).keep.all()
    one, two = (make_plan(table, name, 0.4, threat="Linf:8/255", seed=5, **params) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert np.array_equal(one.eps, two.eps)
    for column, values in before.items():
        assert np.array_equal(getattr(table, column), values)


@pytest.mark.parametrize("share", [-0.1, 1.0, 30, float("nan"), "0.3", True])
def test_prune_fraction_out_of_range_is_refused(share: object) -> None:
    table = make_table([0.1, 0.2], [0, 0])
    with pytest.raises(UsageError, match="prune_fraction"):
        make_plan(table, "easy", share, threat="Linf:8/255")  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_prune_fraction_of_every_kind_of_number(share: object) -> None:
    table = make_table([0.1, 0.2], [0, 0])
    assert make_plan(table, "easy", share, threat="Linf:8/255").kept == 1  # type: ignore[arg-type]


def test_misspelt_names_get_a_suggestion() -> None:
    table = make_table([0.1, 0.2], [0, 0])
    with pytest.raises(UsageError, match=r"unknown strategy 'pumma'\n.*did you mean 'puma'"):
        make_plan(table, "pumma", threat="Linf:8/255")
    with pytest.raises(UsageError, match="did you mean 'mean_eps_ratio'"):
        make_plan(table, "puma", threat="Linf:8/255", mean_eps_ration=0.5)
    with pytest.raises(UsageError, match="has no parameters"):
        make_plan(table, "easy", threat="Linf:8/255", c=0.5)
    assert get_strategy("puma").parameters == {"c": 1.0, "mean_eps_ratio": None}
    assert {"none", "random", "easy", "difficult", "puma", "puma-plus", "uniform-eps"} <= set(names())


def test_other_norm_is_refused_only_where_margin_meets_eps() -> None:
    table = make_table([0.1, 0.2, 0.3, 0.4], [0, 0, 0, 0], norm="L2")
    with pytest.raises(DataError, match=r"L2.*Linf:8/255"):
        make_plan(table, "puma", 0.5, threat="Linf:8/255")
    assert make_plan(table, "easy", 0.5, threat="Linf:8/255").kept == 2


def test_emptied_class_is_refused() -> None:
    table = make_table([0.1, 0.2, 0.3, 0.9], [0, 0, 0, 1])
    with pytest.raises(DataError, match=r"empties 1 of 2 classes \(1\)"):
        make_plan(table, "easy", 0.3, threat="Linf:8/255", class_balanced=False)
    assert make_plan(table, "easy", 0.25, threat="Linf:8/255").keep.tolist() == [True, True, False, True]


def test_many_rows_without_margin_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    margin = np.linspace(0.01, 1, 100)
    margin[:2] = np.nan
    plan = make_plan(make_table(margin, np.zeros(100, int)), "puma", 0.3, threat="Linf:8/255")
    assert any("2 of 100 rows" in warning for warning in plan.warnings)
    assert "2 of 100 rows" in caplog.text
    assert plan.keep[:2].all()
    assert plan.kept == 70


def test_quota_short_of_scores_says_so() -> None:
    margin = [np.nan, np.nan, np.nan, 0.2]
    plan = make_plan(make_table(margin, [0, 0, 0, 0]), "easy", 0.5, threat="Linf:8/255")
    assert plan.kept == 3
    assert any("1 rows fewer" in warning for warning in plan.warnings)


@settings(deadline=None, max_examples=25)
@given(table=tables(nan=True), share=st.floats(0, 0.5))
def test_plan_survives_its_file(table: MarginTable, share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    plan = make_plan(table, "puma", share, threat="Linf:8/255")
    path = tmp_path_factory.mktemp("plan") / "plan.parquet"
    plan.write(path)
    again = Plan.read(path)
    assert again.fingerprint == plan.fingerprint
    assert np.array_equal(again.keep, plan.keep)
    assert np.array_equal(again.eps, plan.eps)
    assert str(again.threat) == "Linf:8/255"
    assert again.mean_eps == pytest.approx(plan.eps[plan.keep].mean(), rel=1e-5)
