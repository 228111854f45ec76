"""The screening attack, the attack that follows it, and the warning that eps is too large."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_study import small_study

from puma.study.folder import StudyFolder, collect, write_results
from puma.study.runner import eps_warnings, work
from puma.study.spec import StudySpec
from puma.tradeoff.results import read_flags, read_results


def test_every_run_is_screened_and_the_grids_that_ask_for_it_are_attacked(tmp_path: Path) -> None:
    screened = {"screen": "ce-cw-2", "screen_subset": 40, "attack": "standard", "subset": 20, "mislabelled": 0}
    grid = [{"strategies": ["none"]}, {"strategies": ["random"], "prune_fractions": [0.5], "standard": False}]
    study = small_study(tmp_path, evaluation=screened, grid=grid)
    work(study)
    write_results(study)
    none, random = read_results(study.path / "results.parquet")
    assert (none["n_pgd"], none["n_test"], random["n_pgd"], random["n_test"]) == (40, 20, 40, 0)
    assert none["robust_accuracy"] is not None
    assert random["robust_accuracy"] is None  # the screening attack is not called that
    for attack, runs, column in (("ce-cw-2", 2, "pgd_accuracy"), ("standard", 1, "robust_accuracy")):
        flags = read_flags(study.path / "flags.parquet", attack)
        assert len(flags) == runs
        for (_, setting, _), (images, _) in flags.items():
            row = none if setting.strategy == "none" else random
            assert np.nanmean(images.robust) == pytest.approx(row[column])
            assert np.mean(images.clean) == pytest.approx(row["clean_accuracy"])


def made_up(folder: Path, accuracies: dict[tuple[float, int], tuple[float, float]]) -> StudyFolder:
    """A study whose finished runs have these (clean, robust) accuracies by scale of eps and seed; 1 is ``none``."""
    scales = sorted({scale for scale, _ in accuracies if scale < 1})
    grid = [{"strategies": ["none", {"name": "uniform-eps", "scale": scales}], "seeds": [0, 1]}]
    spec: dict[str, Any] = {
        "name": "made up", "threat": "Linf:0.1", "recipe": "digits", "network": {"name": "small-cnn"}, "grid": grid,
        "pool": {"real": "digits", "test": "digits:test", "synthetic": 500},
    }  # fmt: skip
    study = StudyFolder.create(StudySpec.parse(spec), folder)
    for run in study.spec.runs():
        if (pair := accuracies.get((dict(run.params).get("scale", 1.0), run.seed))) is not None:
            row = {"checkpoint": "last", "clean_accuracy": pair[0], "robust_accuracy": pair[1]}
            study.finish(run.key, {"rows": [row], "flags": []})
    return study


def test_an_eps_that_a_smaller_one_beats_twice_is_named(tmp_path: Path) -> None:
    beaten = made_up(tmp_path / "a", {(1.0, 0): (0.90, 0.50), (0.5, 0): (0.95, 0.55), (0.75, 0): (0.92, 0.49)})
    (warning,) = eps_warnings(beaten)
    assert "0.5 eps on all data is better than full eps in clean (+5.0%) and in robust accuracy (+5.0%)" in warning
    assert not eps_warnings(made_up(tmp_path / "b", {(1.0, 0): (0.9, 0.5), (0.5, 0): (0.95, 0.45)}))
    assert not eps_warnings(made_up(tmp_path / "c", {(1.0, 0): (0.9, 0.5), (0.5, 1): (0.95, 0.55)}))  # other seeds
    assert len(collect(beaten)) == 3


def test_the_warning_comes_with_the_run_that_shows_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = [{"strategies": ["none", {"name": "uniform-eps", "scale": 0.5}], "standard": False}]
    study = small_study(tmp_path, evaluation={"screen": "ce-cw-1", "screen_subset": 20, "mislabelled": 0}, grid=grid)
    none, half = study.spec.runs()
    study.finish(none.key, {"rows": [{"checkpoint": "last", "clean_accuracy": 0.0, "pgd_accuracy": -1.0}], "flags": []})
    with caplog.at_level(logging.WARNING, "puma"):
        work(study)
    assert study.result(half.key) is not None
    assert any("in accuracy under the screen (+" in record.message for record in caplog.records)


def test_accuracies_under_different_attacks_are_never_compared(tmp_path: Path) -> None:
    """`none` has AutoAttack and the screen, the smaller eps only the screen: under that, it is less robust."""
    study = made_up(tmp_path, {(1.0, 0): (0.90, 0.50), (0.5, 0): (0.95, 0.55)})
    for run in study.spec.runs():
        if (result := study.result(run.key)) is not None:
            screened = {"none": {"pgd_accuracy": 0.58}, "uniform-eps": {"robust_accuracy": None, "pgd_accuracy": 0.55}}
            study.finish(run.key, {"rows": [result["rows"][0] | screened[run.strategy]], "flags": []})
    assert not eps_warnings(study)
