"""Every strategy on a table of twenty rows, worked out by hand.

Four real rows (0-3, protected) and sixteen synthetic ones, eight of class 0 (4-11) and eight of class 1 (12-19).
eps = 0.08, prune_fraction = 1/4: two rows of each class go.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from score_tables import make_table

from puma.errors import DataError, UsageError
from puma.margins import MarginTable, Status
from puma.plan import Plan
from puma.strategies import STRATEGIES, Selection, SelectionContext, make_plan, strategy
from puma.strategies.selectors import duplicate_scores, extrapolate, read_features
from puma.study.spec import RunSpec

MARGIN = [0.20, 0.03, -0.05, 0.10]  # real
MARGIN += [0.10, 0.02, -0.01, 0.06, 0.04, -0.03, 0.08, 0.03]  # class 0: rows 4-11
MARGIN += [0.05, 0.01, -0.02, 0.07, 0.09, -0.04, 0.12, 0.025]  # class 1: rows 12-19
LABEL = [0, 0, 1, 1] + [0] * 8 + [1] * 8
# min(0.08, max(margin, 0)) of every row: c = 1
CAPPED = [0.08, 0.03, 0, 0.08, 0.08, 0.02, 0, 0.06, 0.04, 0, 0.08, 0.03, 0.05, 0.01, 0, 0.07, 0.08, 0, 0.08, 0.025]
RANKS = [0.5] * 4 + [8, 3, 5, 1, 7, 2, 6, 4] + [1, 2, 3, 4, 5, 6, 7, 8]


def table(**scores: object) -> MarginTable:
    return make_table(MARGIN, LABEL, real=4, **scores)


def plan(strategy: str, given: MarginTable | None = None, **params: object) -> Plan:
    return make_plan(given or table(), strategy, 0.25, threat="Linf:0.08", **params)  # type: ignore[arg-type]


def dropped(made: Plan) -> set[int]:
    return set(np.flatnonzero(~made.keep).tolist())


def eps_of(values: list[float] | np.ndarray, gone: set[int]) -> np.ndarray:
    return np.where(np.isin(np.arange(20), list(gone)), 0, np.asarray(values)).astype(np.float32)


def test_none_and_the_two_controls() -> None:
    for name, params, eps, weight in (
        ("none", {}, 0.08, None),
        ("uniform-eps", {"scale": 0.5}, 0.04, None),
        ("uniform-eps", {"scale": 0.0}, 0.0, None),
        ("uniform-eps", {"scale": 1.5}, 0.12, None),
        ("trades-beta", {"beta": 3}, 0.08, 3.0),
    ):
        made = plan(name, **params)
        assert made.keep.all()
        np.testing.assert_allclose(made.eps, eps, rtol=1e-6)
        assert made.beta == weight
        assert made.meta["prune_fraction"] == 0


@pytest.mark.parametrize(("name", "gone"), [("easy", {4, 10, 16, 18}), ("difficult", {6, 9, 14, 17})])
def test_the_two_ends(name: str, gone: set[int]) -> None:
    made = plan(name)
    assert dropped(made) == gone
    np.testing.assert_array_equal(made.eps, eps_of([0.08] * 20, gone))


@pytest.mark.parametrize("name", ["random", "random-cap"])
def test_random_takes_two_of_each_class(name: str) -> None:
    made = plan(name, seed=1)
    assert dropped(made) == dropped(plan("random", seed=1))
    assert dropped(made) != dropped(plan(name, seed=2))
    assert [len(dropped(made) & set(rows)) for rows in (range(4), range(4, 12), range(12, 20))] == [0, 2, 2]
    expected = eps_of([0.08] * 20 if name == "random" else CAPPED, dropped(made))
    np.testing.assert_allclose(made.eps, expected, rtol=1e-6)


def test_random_is_uniform_over_the_rows_of_a_class() -> None:
    counts = np.zeros(20)
    for seed in range(400):
        counts[~plan("random", seed=seed).keep] += 1
    assert (counts[:4] == 0).all()
    assert np.abs(counts[4:] - 100).max() < 4.5 * np.sqrt(400 * 0.25 * 0.75)


def test_puma() -> None:
    gone = {4, 10, 16, 18}
    made = plan("puma")
    assert dropped(made) == gone
    np.testing.assert_allclose(made.eps, eps_of(CAPPED, gone), rtol=1e-6)
    assert made.meta["derived"] == {"c": 1.0}
    assert made.mean_eps == pytest.approx(0.495 / 16)
    np.testing.assert_allclose(plan("puma", c=0.5).eps[[0, 1, 2, 7]], [0.08, 0.015, 0, 0.03], rtol=1e-6)
    # 14 of the 16 kept rows have a margin below 0.08
    assert made.meta["counts"]["reach"] == pytest.approx(14 / 16)
    assert made.meta["counts"]["regime"] == pytest.approx({"misclassified": 5 / 20, "below_eps": 9 / 20})
    assert any("eps is large for this margin model: eps is lowered on 88% of the 16" in line for line in made.warnings)
    assert not any("eps is large" in line for line in make_plan(table(), "puma", 0.25, threat="Linf:0.02").warnings)


def test_mean_eps_ratio_solves_for_c() -> None:
    for ratio in (0.05, 0.3, 0.5, 0.68):
        made = plan("puma", mean_eps_ratio=ratio)
        assert made.mean_eps == pytest.approx(ratio * 0.08, rel=1e-5)
        np.testing.assert_allclose(made.eps, plan("puma", c=made.meta["derived"]["c"]).eps, rtol=1e-6)
    # 11 of 16 kept rows have a positive margin: at most 11/16 of the budget can be spent, and that is possible
    assert plan("puma", mean_eps_ratio=11 / 16).mean_eps == pytest.approx(11 / 16 * 0.08, rel=1e-6)
    with pytest.raises(UsageError, match=r"at most 0\.6875"):
        plan("puma", mean_eps_ratio=0.7)
    with pytest.raises(UsageError, match="cannot both"):
        plan("puma", mean_eps_ratio=0.3, c=0.4)
    for wrong in (
        {"c": 0},
        {"c": -1},
        {"c": True},
        {"c": float("nan")},
        {"c": "half"},
        {"mean_eps_ratio": 0},
        {"mean_eps_ratio": 1.5},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            plan("puma", **wrong)


def test_puma_plus() -> None:
    # each class keeps six, at most floor(0.2 * 6) = 1 of them misclassified: the lowest of two goes, then the highest
    gone = {4, 9, 17, 18}
    made = plan("puma-plus")
    assert dropped(made) == gone
    # f = 16/20; nine rows have 0 < margin < 0.08, five are negative: c = (9/20 * 16/20) / (9/20 * 16/20 + 5/20)
    c = 0.36 / 0.61
    assert made.meta["derived"] == pytest.approx({"c": c, "kept_share": 0.8, "below_eps": 0.45, "misclassified": 0.25})
    expected = np.minimum(0.08, c * np.maximum(MARGIN, 0))
    np.testing.assert_allclose(made.eps, eps_of(expected, gone), rtol=1e-5)


def test_puma_plus_ceiling_and_budget() -> None:
    assert dropped(plan("puma-plus", max_misclassified=1)) == {4, 10, 16, 18}  # none beyond the ceiling: like puma
    assert dropped(plan("puma-plus", max_misclassified=0)) == {6, 9, 14, 17}  # two beyond it: the whole budget
    # a budget of one cannot remove both, and is not exceeded
    made = make_plan(table(), "puma-plus", 0.125, threat="Linf:0.08", max_misclassified=0)
    assert dropped(made) == {9, 17}
    np.testing.assert_allclose(plan("puma-plus", c=1.0, max_misclassified=1).eps, plan("puma").eps)
    with pytest.raises(UsageError, match="max_misclassified"):
        plan("puma-plus", max_misclassified=1.5)


def test_automatic_c_is_clipped_at_both_ends() -> None:
    right = make_table(np.abs(MARGIN), LABEL, real=4)
    assert plan("puma-plus", right).meta["derived"]["c"] == 0.75
    far = make_table([1.0] * 20, LABEL, real=4)  # p + err = 0
    assert plan("puma-plus", far).meta["derived"]["c"] == 0.75
    wrong = make_table(np.where(np.arange(20) % 2, -0.1, 0.2), LABEL, real=4)  # p = 0, err = 1/2
    assert plan("puma-plus", wrong).meta["derived"]["c"] == 0.25


def test_controls_of_puma() -> None:
    puma = plan("puma")
    cap = plan("cap-only")
    assert cap.keep.all()
    np.testing.assert_allclose(cap.eps, CAPPED, rtol=1e-6)
    shuffled = plan("puma-shuffled")
    assert np.array_equal(shuffled.keep, puma.keep)
    np.testing.assert_array_equal(np.sort(shuffled.eps), np.sort(puma.eps))
    assert not np.array_equal(shuffled.eps, puma.eps)
    matched = plan("easy-matched")
    assert np.array_equal(matched.keep, puma.keep)
    np.testing.assert_allclose(matched.eps[matched.keep], 0.495 / 16, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("el2n-adv", {7, 9, 12, 13}),
        ("dynamic-uncertainty", {7, 9, 12, 13}),
        ("robust-failure", {4, 8, 18, 19}),
        ("input-gradient", {4, 8, 18, 19}),
    ],
)
def test_scores_of_a_run(name: str, gone: set[int]) -> None:
    made = plan(name, table(**{name.replace("-", "_"): RANKS}))
    assert dropped(made) == gone
    np.testing.assert_array_equal(made.eps, eps_of([0.08] * 20, gone))
    with pytest.raises(DataError, match=f"no scores '{name}'"):
        plan(name)


def test_rows_without_a_score_are_kept_and_counted_short() -> None:
    scores = np.array(RANKS, float)
    scores[4:11] = np.nan
    made = plan("el2n-adv", table(el2n_adv=scores))
    assert dropped(made) == {11, 12, 13}
    assert any("1 rows fewer" in warning for warning in made.warnings)
    with pytest.raises(DataError, match="all NaN"):
        plan("el2n-adv", table(el2n_adv=np.full(20, np.nan)))


def test_uncertainty_is_carried_to_synthetic_rows_by_neighbours() -> None:
    scores = np.full(20, np.nan)
    scores[:4] = [0.1, 0.9, 0.2, 0.8]
    # rows 4-11 lie near the real row 0, except 5 and 6 near row 1; rows 12-19 near row 3, except 18 and 19 near row 2
    place = [0.0, 10.0, 20.0, 30.0] + [1, 9, 11, 1, 1, 1, 1, 1] + [29] * 6 + [21, 19]
    features = np.array(place, float)[:, None]
    made = plan("dynamic-uncertainty", table(dynamic_uncertainty=scores), features=features, n_neighbors=1)
    assert dropped(made) - {18, 19} <= {4, 7, 8, 9, 10, 11}  # two of the six that tie at 0.1
    assert {18, 19} <= dropped(made)
    assert len(dropped(made)) == 4
    assert made.meta["derived"] == {"extrapolated": 16}


def test_extrapolation_is_the_mean_of_the_nearest() -> None:
    rng = np.random.default_rng(0)
    features, scores = rng.normal(size=(60, 4)), rng.random(60).astype(np.float32)
    scores[20:] = np.nan
    filled = extrapolate(scores, features, n_neighbors=3)
    np.testing.assert_array_equal(filled[:20], scores[:20])
    for row in range(20, 60):
        nearest = np.argsort(((features[:20] - features[row]) ** 2).sum(axis=1))[:3]
        assert filled[row] == pytest.approx(scores[nearest].mean(), rel=1e-6)
    np.testing.assert_allclose(extrapolate(scores, features, n_neighbors=99)[20:], scores[:20].mean(), rtol=1e-6)
    with pytest.raises(DataError, match="NaN"):
        extrapolate(scores, np.where(np.arange(60)[:, None] == 30, np.nan, features), 3)
    with pytest.raises(DataError, match="no row"):
        extrapolate(np.full(60, np.nan, np.float32), features)


def test_ccs_drops_the_hardest_and_thins_the_strata() -> None:
    # class 0: row 9 is the hardest eighth; the rest spans -0.01..0.10 in two bins cut at 0.045, {5, 6, 8, 11} and
    # {4, 7, 10}; six may stay: the smaller bin keeps min(3, 6 // 2) = 3, the larger the other 3
    # class 1: row 17 goes; -0.02..0.12 is cut at 0.05: {13, 14, 19} and {12, 15, 16, 18} (an edge belongs above)
    made = plan("ccs", beta=0.125, bins=2)
    assert {9, 17} <= dropped(made)
    rest = dropped(made) - {9, 17}
    assert len(rest & {5, 6, 8, 11}) == 1
    assert len(rest & {12, 15, 16, 18}) == 1
    assert dropped(plan("ccs", beta=1)) == {6, 9, 14, 17}  # never more than the budget: like difficult


def test_dedup_keeps_one_of_each_set_of_duplicates() -> None:
    angle = np.zeros(20)
    angle[4:12] = [0.0, 0.0, 1.0, 1.001, 2.0, 3.0, 4.0, 5.0]  # rows 4, 5 are the same; 6, 7 nearly
    angle[12:20] = [0.0, 0.7, 1.4, 2.1, 2.8, 2.8, 4.2, 4.2]
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    gone = dropped(plan("dedup", features=features))
    assert [len(gone & pair) for pair in ({4, 5}, {6, 7}, {16, 17}, {18, 19})] == [1, 1, 1, 1]
    with pytest.raises(UsageError, match="needs features"):
        plan("dedup")
    with pytest.raises(DataError, match="one vector for each of the pool's 20 images"):
        plan("dedup", features=features[:5])


def test_duplicate_scores_against_the_loop() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 3))
    scores = duplicate_scores(features, cluster_rows=1_000)
    unit = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    order = np.argsort(unit @ unit.mean(axis=0), kind="stable")
    for place, row in enumerate(order):
        before = [float(unit[row] @ unit[other]) for other in order[:place]]
        assert scores[row] == pytest.approx(max(before, default=-1.0), abs=1e-5)
    assert len(duplicate_scores(rng.normal(size=(500, 3)), cluster_rows=50)) == 500


def test_features_from_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    array = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    np.save(tmp_path / "features.npy", array)
    np.testing.assert_array_equal(read_features(str(tmp_path / "features.npy"), 20), array)
    (tmp_path / "broken.npy").write_bytes(b"no array")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", np.zeros((20, 2), int))
    for name in ("absent.npy", "broken.npy", "pickled.npy", "whole.npy"):
        with pytest.raises(DataError):
            read_features(tmp_path / name, 20)


def test_minus_infinity_and_missing_margins() -> None:
    margin = np.array(MARGIN)
    margin[[9, 17]] = -np.inf
    margin[[4, 16]] = np.nan
    given = make_table(margin, LABEL, real=4)
    assert dropped(plan("difficult", given)) == {6, 9, 14, 17}
    assert dropped(plan("puma-plus", given)) == {9, 10, 17, 18}
    made = plan("puma", given)
    assert dropped(made) == {7, 10, 15, 18}
    assert made.eps[[9, 17]].tolist() == [0, 0]
    np.testing.assert_allclose(made.eps[[4, 16]], 0.08)
    # a status that says there is no margin wins over a number in the column
    status = np.where(np.isnan(margin), Status.NAN, Status.CROSSED)
    margin[[4, 16]] = 0.5
    assert dropped(plan("puma", make_table(margin, LABEL, real=4, status=status))) == {7, 10, 15, 18}


def test_unprotected_and_unbalanced() -> None:
    made = make_plan(table(), "easy", 0.25, threat="Linf:0.08", protect_real=False, class_balanced=False)
    assert dropped(made) == {0, 3, 4, 16, 18}  # the five highest of all twenty
    balanced = make_plan(table(), "easy", 0.25, threat="Linf:0.08", protect_real=False)
    # a quarter of 2, 2, 8 and 8 rows: 0.5, 0.5, 2 and 2; five in all, the tie goes to the real rows of class 0
    assert dropped(balanced) == {0, 4, 10, 16, 18}


def test_collapse_and_reach_are_warned_about_with_numbers() -> None:
    easy = plan("easy")
    # after PE: nine of the sixteen kept rows have 0 < margin < 0.08
    assert easy.meta["counts"]["mislabelled_after"] == pytest.approx(9 / 16)
    assert easy.meta["counts"]["mislabelled_before"] == pytest.approx(9 / 20)
    assert any("56% of the kept images" in warning for warning in easy.warnings)
    assert any("mean eps 0.08" in warning for warning in easy.warnings)
    assert not any("collapse" in warning for warning in plan("puma", c=0.5).warnings)
    near = make_table(np.full(20, 0.05), LABEL, real=4)
    assert any("eps is lowered on 100%" in warning for warning in plan("puma", near).warnings)


@pytest.mark.parametrize("place", ["CONTRIBUTING.md", "docs/strategies.md"])
def test_the_example_of_a_new_strategy_works(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / place).read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@strategy" in code]
    monkeypatch.setitem(STRATEGIES, "loudest", STRATEGIES["none"])  # so that it is taken off the list again
    exec(example, {"strategy": strategy, "SelectionContext": SelectionContext, "Selection": Selection})
    made = plan("loudest", table(loudness=RANKS))
    assert dropped(made) == {7, 9, 12, 13}
    np.testing.assert_array_equal(made.eps, eps_of([0.08] * 20, {7, 9, 12, 13}))
    # a study joins a table of scores only for a strategy that says it needs one
    assert RunSpec("loudest", (), 0.25, 0, "digits", None).needs_snapshots


def test_every_strategy_is_described() -> None:
    for name, rule in STRATEGIES.items():
        assert rule.name == name
        assert rule.summary.endswith((".", "eps"))
        assert rule.source
