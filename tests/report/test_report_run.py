"""The report of a run that AutoAttack standard has not evaluated."""

from __future__ import annotations

import json
import shutil

import pytest
from made_up_study import write_run

from puma.report import make_report
from puma.report.page import number


@pytest.fixture
def run(tmp_path):
    """A run whose last network was evaluated by two weaker attacks, its best one by one of them."""
    write_run(tmp_path / "run", "puma", "{}", 0.6, 0)
    standard = tmp_path / "run" / "evaluation.json"
    shutil.copytree(tmp_path / "run", tmp_path / "run" / "best", ignore=lambda *_: ["evaluation.json"])
    for place, attack, accuracy in ((".", "cw-20", 0.61), (".", "apgd-ce", 0.57), ("best", "cw-20", 0.63)):
        evaluation = json.loads(standard.read_text()) | {"attack": attack, "attacked_accuracy": accuracy}
        (tmp_path / "run" / place / f"evaluation-{attack}.json").write_text(json.dumps(evaluation))
    standard.unlink()
    return tmp_path / "run"


def evaluated(folder):
    """(checkpoint, attack, accuracy under it) of each line, and the weaker attacks among them."""
    report = make_report(folder)
    table = report.tables["evaluation"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    rows = [(row["checkpoint"], row["attack"], number(row.get("under attack"))) for row in rows]
    return rows, report.values["weaker"]


def test_weaker_attacks_are_shown_by_name_as_upper_bounds(run):
    rows, weaker = evaluated(run)
    assert rows == [("last", "apgd-ce", 0.57), ("last", "cw-20", 0.61), ("best", "cw-20", 0.63)]
    assert weaker == ["apgd-ce", "cw-20"]
    text = make_report(run).html()
    assert "so that accuracy under it is an upper bound: apgd-ce, cw-20." in text
    assert "Evaluation of the last checkpoint (apgd-ce)" in text
    assert "57.0 % under apgd-ce (400 images), last checkpoint." in text


def test_autoattack_standard_alone_is_shown_where_it_was_run(run):
    value = json.loads((run / "evaluation-cw-20.json").read_text()) | {"attack": "standard", "attacked_accuracy": 0.5}
    for folder in (run, run / "best"):
        (folder / "evaluation.json").write_text(json.dumps(value))
    assert evaluated(run) == ([("last", "standard", 0.5), ("best", "standard", 0.5)], [])


def test_two_threat_models_are_told_apart(run):
    value = json.loads((run / "evaluation-cw-20.json").read_text()) | {"attack": "standard", "attacked_accuracy": 0.5}
    value["threat"] = {"norm": "Linf", "eps": 8 / 255, "text": "Linf:8/255"}
    (run / "evaluation.json").write_text(json.dumps(value))
    value |= {"attacked_accuracy": 0.2, "threat": {"norm": "Linf", "eps": 16 / 255, "text": "Linf:16/255"}}
    (run / "evaluation-Linf-16_255.json").write_text(json.dumps(value))
    first, second = evaluated(run)[0][:2]
    assert first[2] == 0.5
    assert second == ("last", "standard, Linf:16/255", 0.2)
    assert "50.0 % under AutoAttack standard at Linf:8/255 (400 images)" in make_report(run).html()


def test_clean_accuracy_alone_is_no_attack(run):
    for path in run.rglob("evaluation-*.json"):
        path.unlink()
    value = {"attack": "clean", "clean_accuracy": 0.9, "attacked_accuracy": None, "n_test": 0, "n_clean": 899}
    (run / "evaluation-clean.json").write_text(json.dumps(value))
    assert evaluated(run) == ([("last", "clean", None)], [])
    assert ">90.0 % clean accuracy, last checkpoint.<" in make_report(run).html()
