"""``puma study run --dry-run`` and ``puma demo --dry-run``: what is left, what it costs, and nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import tomli_w
from small_study import small_study
from typer.testing import CliRunner

from puma.cli.app import app
from puma.study.stages import study_tasks


def dry_run(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words), "--dry-run"])
    assert result.exit_code == 0, (result.exception, result.output)
    return " ".join(result.output.split())


def test_a_study_is_costed_before_it_begins_and_from_what_it_recorded(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    file, target = tmp_path / "small.toml", tmp_path / "new"
    file.write_text(tomli_w.dumps(study.spec.model_dump(exclude_none=True)))
    text = dry_run("study", "run", file, "--out", target)
    assert "small: 2 runs" in text
    assert "runs 2 0" in text
    assert "measured" in text
    assert "recorded" not in text
    assert not target.exists()
    before = {path: path.stat().st_mtime_ns for path in study.path.rglob("*")}
    assert "runs 2 0" in dry_run("study", "run", study.path)
    assert {path: path.stat().st_mtime_ns for path in study.path.rglob("*")} == before
    for task in study_tasks(study):
        if task.name != "mislabelled-puma-p50-s0-short":
            study.finish(task.name, {"seconds": 7200.0})
    text = dry_run("study", "run", study.path, "--jobs", 2)
    assert re.search(r"mislabelled perturbations 2 1 2\.0 h recorded", text), text
    assert "2.00 core-hours: about 1.0 h with --jobs 2; threads of a process: " in text
