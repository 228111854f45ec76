"""The command, its page and its pictures, on grids of a few seconds."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from puma.cli.app import app
from puma.perceptron import experiments
from puma.perceptron.task import Strategy
from puma.report.perceptron import (
    Results,
    measure_gaps,
    run_experiments,
    write_page,
)

SMALL = tuple(
    replace(experiment, dimension=40, seeds=2, keeps=(0.4, 0.8), eps=experiment.eps[:1], alphas=alphas)
    for experiment, alphas in zip(experiments.DEFAULT, [(2, 20), (20,), (2, 5, 20), (2, 5, 20)], strict=True)
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_experiments(SMALL, tmp_path_factory.mktemp("perceptron"))


def test_the_page_and_the_pictures_are_whole_and_repeat(results: Results, tmp_path: Path) -> None:
    text = write_page(results, tmp_path, tmp_path / "pictures").read_text()
    assert write_page(results, tmp_path / "again").read_text() == text
    assert text.count("<figure") == 4
    assert "http://" not in text.replace("http://www.w3.org", "")
    inside = [base64.b64decode(one).decode() for one in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]
    pictures = {path.name: path.read_text() for path in (tmp_path / "pictures").iterdir()}
    assert sorted(pictures) == [
        f"perceptron-{name}.svg" for name in ("collapse", "learning", "mislabelling", "tradeoff")
    ]
    assert sorted(pictures.values()) == sorted(inside)
    assert all("fill: #ffffff" in picture for picture in inside)


def test_gaps_are_measured_to_each_seeds_own_frontier() -> None:
    """Two seeds with frontiers of their own: a student 2 and 4 points above them has a gap of 3."""
    rows = []
    for seed, lift in ((0, 0.02), (1, 0.04)):
        for strategy, robust, clean in (
            ("none", 0.6, 0.8),
            ("uniform-eps(0.25)", 0.4, 0.9),
            ("puma", 0.5, 0.85 + lift),
        ):
            error = {"clean_error": 1 - clean - seed / 100, "robust_error": 1 - robust}
            rows.append({"strategy": strategy, "keep": 1.0 if strategy != "puma" else 0.6, "seed": seed, **error})
        rows.append({"strategy": "random", "keep": 0.6, "seed": seed, "clean_error": 0.5, "robust_error": 0.9})
    gaps = measure_gaps(pd.DataFrame(rows)).set_index("strategy")
    assert gaps.loc["puma", "gap"] == pytest.approx(0.03)
    assert gaps.loc["puma", "gap_se"] == pytest.approx(0.01)
    assert np.isnan(gaps.loc["random", "gap"])  # beyond the control's range: not comparable
    assert set(gaps.index) == {"puma", "random"}


@pytest.mark.parametrize("full", [False, True])
def test_the_command_asks_for_the_right_experiments_and_says_where(
    full: bool, results: Results, monkeypatch, tmp_path: Path
) -> None:
    from puma.cli.demo import perceptron

    asked = {}

    def run(wanted, out, **options):
        asked.update(options, experiments=wanted, out=out)
        return results

    def write(shown, out, pictures):
        asked.update(shown=shown, pictures=pictures)
        return out / "report.html"

    monkeypatch.setattr("puma.report.perceptron.run_experiments", run)
    monkeypatch.setattr("puma.report.perceptron.write_page", write)
    app = typer.Typer()
    app.command()(perceptron)
    pictures = tmp_path / "pictures"
    flags = ["--out", str(tmp_path), "--jobs", "3", "--quiet", "--pictures", str(pictures)]
    answer = CliRunner().invoke(app, flags + ["--full"] * full)
    assert answer.exit_code == 0, answer.output
    assert str(tmp_path / "report.html") in answer.output.replace("\n", "")
    assert asked["experiments"] is (experiments.FULL if full else experiments.DEFAULT)
    assert (asked["out"], asked["workers"], asked["progress"]) == (tmp_path, 3, False)
    assert (asked["shown"], asked["pictures"]) == (results, pictures)


def test_every_standing_experiment_can_be_computed() -> None:
    for experiment in (*experiments.DEFAULT, *experiments.FULL):
        assert [Strategy.parse(text) for text in experiment.strategies]
        experiment.check()
    assert [one.name for one in experiments.DEFAULT] == [one.name for one in experiments.FULL]


def test_a_dry_run_counts_training_sets_and_writes_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["perceptron", "--dry-run", "--out", str(tmp_path / "p")])
    assert result.exit_code == 0, result.exception
    assert [line.split()[:3] for line in result.output.splitlines() if line.strip().startswith("learning")] == [
        ["learning", "28", "0"]
    ]
    assert "nothing was written" in result.output
    assert not (tmp_path / "p").exists()
