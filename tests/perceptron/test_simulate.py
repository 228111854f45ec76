"""Selections, tasks and the simulation: the same bits every time, in one process or two, resumed or not."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from puma.errors import ResumeError, UsageError
from puma.perceptron import clean_error, fit, mislabelled_share_after_pruning, robust_error, simulate
from puma.perceptron.task import NAMES, Strategy, Task

SMALL = {"alphas": [4, 2], "keeps": [0.5, 0.8], "seeds": 2, "dimension": 30}


def assert_same(one: pd.DataFrame, two: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.reset_index(drop=True), two.reset_index(drop=True), check_exact=True)


def test_table_covers_the_grid_and_repeats_bit_for_bit() -> None:
    table = simulate(**SMALL)
    pruning = [name for name in NAMES if name not in ("none", "cap-only", "uniform-eps")]
    assert len(table) == 2 * 2 * (len(pruning) * 2 + 3)
    assert_same(table, simulate(**SMALL))
    assert (table["rows"] == np.rint(table["alpha"] * 30 * table["keep"])).all()
    assert_same(table[table["seed"] == 1], simulate(**{**SMALL, "seeds": [1]}))


def test_a_student_of_the_table_can_be_rebuilt_by_hand() -> None:
    """Draw, probe, prune, cap and fit in the open; then judge by Monte Carlo."""
    table = simulate(strategies=["puma(0.5)"], alphas=[5], keeps=[0.6], seeds=[3], dimension=50, eps=[0.3])
    x = np.random.default_rng([3, 0]).standard_normal((250, 50))
    rows = x * np.sign(x[:, :1])
    probe = fit(rows, 0.3)
    margin = rows @ probe / np.linalg.norm(probe)
    kept = np.sort(np.argsort(margin)[:150])
    weights = fit(rows[kept], np.minimum(0.3, np.maximum(margin[kept], 0) / 2))
    fresh = np.random.default_rng(0).standard_normal((100_000, 50))
    attacked = np.sign(fresh[:, 0]) * (fresh @ weights) / np.linalg.norm(weights)
    assert table["clean_error"][0] == pytest.approx((attacked < 0).mean(), abs=0.006)
    assert table["robust_error"][0] == pytest.approx((attacked < 0.3).mean(), abs=0.008)
    assert table["length"][0] == pytest.approx(np.linalg.norm(weights), rel=1e-9)


@pytest.mark.dist
def test_two_processes_and_a_resumed_run_give_the_same_bits(tmp_path: Path) -> None:
    whole = simulate(**SMALL, out=tmp_path / "whole", workers=2)
    parts = sorted((tmp_path / "whole" / "shards").glob("alpha*.json"))
    assert len(parts) == 4
    stamps = {part: part.stat().st_mtime_ns for part in parts}
    parts[0].unlink()
    text = (tmp_path / "whole" / "simulation.csv").read_text()
    assert_same(whole, simulate(**SMALL, out=tmp_path / "whole", workers=2))
    assert (tmp_path / "whole" / "simulation.csv").read_text() == text
    assert parts[0].exists()
    assert all(part.stat().st_mtime_ns == stamps[part] for part in parts[1:])
    with open(tmp_path / "whole" / "simulation.csv") as file:
        first = next(csv.DictReader(file))
    assert float(first["clean_error"]) == whole["clean_error"][0]


def test_a_folder_of_another_grid_is_refused_and_a_larger_grid_goes_on(tmp_path: Path) -> None:
    small = {"strategies": ["none", "easy"], "keeps": [0.5], "dimension": 30, "out": tmp_path}
    first = simulate(alphas=[2], seeds=1, **small)
    more = simulate(alphas=[2, 3], seeds=2, **small)
    assert len(list((tmp_path / "shards").glob("alpha*.json"))) == 4
    assert_same(first, more[(more["alpha"] == 2) & (more["seed"] == 0)])
    with pytest.raises(ResumeError) as caught:
        simulate(alphas=[2], seeds=1, **{**small, "keeps": [0.4]})
    assert "keeps" in str(caught.value)
    assert json.loads((tmp_path / "shards" / "settings.json").read_text())["settings"]["keeps"] == [0.5]


@pytest.mark.parametrize("end", ["high", "low"])
def test_pruning_by_a_perfect_probe_mislabels_as_the_closed_form_says(end: str) -> None:
    """With 200 examples per dimension the student is close to the teacher, and so is its attack."""
    strategy = {"high": "easy", "low": "difficult"}[end]
    table = simulate(strategies=[strategy], alphas=[200], keeps=[0.6, 0.9], dimension=50, probe=0.0, seeds=2)
    for keep in (0.6, 0.9):
        found = table[table["keep"] == keep]["mislabelled"].mean()
        assert found == pytest.approx(float(mislabelled_share_after_pruning(0.3, keep, end)), abs=0.02)


def test_selection_follows_the_rules_row_by_row() -> None:
    margin = np.array([-0.5, -0.1, 0.05, 0.2, 0.9, -0.02, 0.4, 1.5, 0.1, 0.7])
    rng = np.random.default_rng(0)
    for text, kept, radii in [
        ("none", range(10), [0.3] * 10),
        ("easy", [0, 1, 2, 5, 8], [0.3] * 5),
        ("difficult", [3, 4, 6, 7, 9], [0.3] * 5),
        ("puma(0.5)", [0, 1, 2, 5, 8], [0, 0, 0.025, 0, 0.05]),
        ("puma(1)", [0, 1, 2, 5, 8], [0, 0, 0.05, 0, 0.1]),
        ("puma-plus(0.5, 0.2)", [2, 3, 5, 6, 8], [0.025, 0.1, 0, 0.2, 0.05]),
        ("puma-plus(0.5, 0)", [2, 3, 6, 8, 9], [0.025, 0.1, 0.2, 0.05, 0.3]),
        ("cap-only(0.5)", range(10), [0, 0, 0.025, 0.1, 0.3, 0, 0.2, 0.3, 0.05, 0.3]),
        ("uniform-eps(0.25)", range(10), [0.075] * 10),
    ]:
        rows, eps = Strategy.parse(text).select(margin, 0.3, 0.5, rng)
        assert rows.tolist() == list(kept), text
        np.testing.assert_allclose(eps, radii, atol=1e-12, err_msg=text)
    rows, eps = Strategy.parse("random").select(margin, 0.3, 0.5, np.random.default_rng(1))
    assert len(set(rows.tolist())) == 5
    assert (eps == 0.3).all()
    # a budget of one row: puma-plus drops one of the three misclassified, no more
    rows, _ = Strategy.parse("puma-plus(0.5, 0)").select(margin, 0.3, 0.9, rng)
    assert sorted(set(range(10)) - set(rows.tolist())) == [0]
    # auto: p = 3 rows of 10 below eps, err = 3 of 10, f = 1/2
    assert Strategy.parse("puma-plus").cap(0.3, 0.3, 0.5) == pytest.approx(1 / 3)


def test_errors_of_the_anisotropic_task_against_monte_carlo() -> None:
    task = Task.named("anisotropic", 40)
    rng = np.random.default_rng(1)
    weights = task.teacher * [1.0 if scale == 1 else 0.3 for scale in task.scale] + 0.3 * rng.standard_normal(40)
    rows = task.sample(300_000, rng)
    margin = rows @ weights / np.linalg.norm(weights)
    assert (rows @ task.teacher >= 0).all()
    errors = task.errors(weights, 0.25)
    assert errors["clean_error"] == pytest.approx((margin < 0).mean(), abs=0.004)
    assert errors["robust_error"] == pytest.approx((margin < 0.25).mean(), abs=0.004)


def test_isotropic_errors_are_the_closed_forms_and_a_collapsed_student_guesses() -> None:
    task = Task.named("isotropic", 30)
    weights = np.random.default_rng(0).standard_normal(30)
    overlap = weights[0] / np.linalg.norm(weights)
    assert task.errors(weights, 0.2)["clean_error"] == pytest.approx(float(clean_error(overlap)))
    assert task.errors(weights, 0.2)["robust_error"] == pytest.approx(float(robust_error(overlap, 0.2)))
    guess = {"clean_error": 0.5, "robust_error": 1.0}
    assert task.errors(np.zeros(30), 0.2) == guess


@pytest.mark.parametrize(
    "change",
    [
        {"task": "isotopic"},
        {"strategies": ["pumma"]},
        {"strategies": ["puma(-1)"]},
        {"strategies": ["puma(auto)"]},
        {"strategies": ["none(1)"]},
        {"strategies": []},
        {"alphas": [0.0]},
        {"keeps": [0.0]},
        {"keeps": [1.1]},
        {"eps": [-0.1]},
        {"seeds": 0},
        {"dimension": 5},
        {"probe": "selfie"},
        {"probe": 4.0},
        {"task": "anisotropic", "probe": 0.3},
        {"l2": 0.0},
        {"workers": 0},
    ],
    ids=str,
)
def test_unusable_settings_are_refused_before_anything_is_computed(change, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        simulate(**{"dimension": 100_000, "out": tmp_path, **change})
    assert not list(tmp_path.rglob("*.json"))


def test_robust_probe_gives_better_caps_than_a_fragile_one() -> None:
    """The margin model must be robust: with a clean one's margins the cap costs robustness for less accuracy."""
    settings = {
        "task": "anisotropic",
        "strategies": ["puma(0.5)"],
        "alphas": [10],
        "keeps": [0.6],
        "eps": [0.25],
        "seeds": 2,
    }
    robust, fragile = (simulate(**settings, probe=probe, dimension=100) for probe in ("self", "clean"))
    assert fragile["robust_error"].mean() > robust["robust_error"].mean() + 0.05


def test_angles_are_named_in_degrees() -> None:
    table = simulate(strategies=["easy"], alphas=[3], keeps=[0.5], seeds=1, dimension=30, probe=math.radians(20))
    assert table["probe"].tolist() == ["20 deg"]
