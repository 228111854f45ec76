"""The report of a run that AutoAttack standard has not judged."""

from __future__ import annotations

import json
import shutil

import pytest
from made_up_study import write_run

from puma.report.content import Note, Table
from puma.report.run import run_report


@pytest.fixture
def run(tmp_path):
    """A run whose last network was judged by two weaker attacks, its best one by one of them."""
    write_run(tmp_path / "run", "puma", "{}", 0.6, 0)
    standard = tmp_path / "run" / "evaluation.json"
    shutil.copytree(tmp_path / "run", tmp_path / "run" / "best", ignore=lambda *_: ["evaluation.json"])
    for place, attack, accuracy in ((".", "cw-20", 0.61), (".", "apgd-ce", 0.57), ("best", "cw-20", 0.63)):
        evaluation = json.loads(standard.read_text()) | {"attack": attack, "attacked_accuracy": accuracy}
        (tmp_path / "run" / place / f"evaluation-{attack}.json").write_text(json.dumps(evaluation))
    standard.unlink()
    return tmp_path / "run"


def judged(folder):
    """(checkpoint, attack, accuracy under it) of each line, and the notes beside them."""
    items = run_report(folder).sections[0].items
    table = next(item for item in items if isinstance(item, Table))
    return [(row[0], row[1], row[3].number) for row in table.rows], [i.text for i in items if isinstance(i, Note)]


def test_weaker_attacks_are_shown_by_name_as_upper_bounds(run):
    rows, notes = judged(run)
    assert rows == [("last", "apgd-ce", 0.57), ("last", "cw-20", 0.61), ("best", "cw-20", 0.63)]
    assert notes == ["Weaker than AutoAttack standard, so that accuracy under it is an upper bound: apgd-ce, cw-20."]
    text = run_report(run).page().html()
    assert "Evaluation of the last checkpoint (apgd-ce)" in text
    assert "has not been judged" not in text


def test_autoattack_standard_alone_is_shown_where_it_was_run(run):
    value = json.loads((run / "evaluation-cw-20.json").read_text()) | {"attack": "standard", "attacked_accuracy": 0.5}
    for folder in (run, run / "best"):
        (folder / "evaluation.json").write_text(json.dumps(value))
    assert judged(run) == ([("last", "standard", 0.5), ("best", "standard", 0.5)], [])


def test_clean_accuracy_alone_is_no_attack(run):
    for path in run.rglob("evaluation-*.json"):
        path.unlink()
    value = {"attack": "clean", "clean_accuracy": 0.9, "attacked_accuracy": None, "n_test": 0, "n_clean": 899}
    (run / "evaluation-clean.json").write_text(json.dumps(value))
    assert judged(run) == ([("last", "clean", None)], [])
