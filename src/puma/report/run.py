"""The report of one run: its settings, its training, how it was judged."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from puma.errors import DataError
from puma.io import read_json
from puma.report.content import Item, Note, Report, Section, Settings, Table
from puma.report.page import Value
from puma.report.training import curve_items, read_curves


def run_report(folder: Path | str) -> Report:
    """What the report of a run says; a run that is not finished is shown as far as it is.

    Raises:
        DataError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "metrics.csv").is_file():
        raise DataError(f"{folder} holds no run", why="it has no metrics.csv", fix="`puma train --out` makes one")
    columns = read_curves(folder / "metrics.csv")
    sections = [
        Section("How it was judged", _judged(folder)),
        Section("Training", curve_items({folder.resolve().name: columns}) or ["No step is in `metrics.csv` yet."]),
        Section("Settings", _settings(folder)),
    ]
    state = "finished" if (folder / "last.safetensors").is_file() else "not finished"
    steps = int(columns["step"][-1]) if len(columns.get("step", ())) else 0
    return Report(f"Run {folder.resolve().name}", f"{state}, {steps:,} steps", sections)


def _judged(folder: Path) -> list[Item]:
    judged = [
        (name, dict(read_json(path)))
        for name, place in (("last", folder), ("best", folder / "best"))
        for path in _evaluations(place)
    ]
    if not judged:
        return [Note("info", "This run has not been judged yet: `puma evaluate` does it.")]
    rows = [[name, *_cells(evaluation)] for name, evaluation in judged]
    head = ["checkpoint", "attack", "clean accuracy", "accuracy under it", "images attacked", "images for clean"]
    items: list[Item] = [Table("evaluation", head, rows, "Accuracies with their 95 % intervals over test images.")]
    if weaker := sorted({str(evaluation.get("attack")) for _, evaluation in judged} - {"standard", "clean"}):
        text = "Weaker than AutoAttack standard, so that accuracy under it is an upper bound"
        items.append(Note("info", f"{text}: {', '.join(weaker)}."))
    items += [
        Settings(evaluation, f"Evaluation of the {name} checkpoint ({evaluation.get('attack')})")
        for name, evaluation in judged
    ]
    return items


def _evaluations(folder: Path) -> list[Path]:
    """AutoAttack standard's file; where it was not run, those of the weaker attacks."""
    standard = folder / "evaluation.json"
    return [standard] if standard.is_file() else sorted(folder.glob("evaluation-*.json"))


def _cells(evaluation: dict[str, Any]) -> list[Any]:
    shown = [
        _accuracy(evaluation.get("clean_accuracy"), evaluation.get("clean_interval")),
        _accuracy(evaluation.get("attacked_accuracy"), evaluation.get("robust_interval")),
    ]
    return [str(evaluation.get("attack", "")), *shown, evaluation.get("n_test"), evaluation.get("n_clean")]


def _accuracy(value: float | None, interval: Any) -> Value:
    if value is None:
        return Value(None, "–")
    if not interval:
        return Value(value, f"{value:.3f}")
    return Value(value, f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]")


def _settings(folder: Path) -> list[Item]:
    items: list[Item] = []
    if (folder / "recipe.toml").is_file():
        items.append(Settings(tomllib.loads((folder / "recipe.toml").read_text()), "Recipe"))
    if (folder / "run.json").is_file():
        run = dict(read_json(folder / "run.json"))
        settings = {name: value for name, value in run.get("settings", {}).items() if not name.startswith("recipe.")}
        items += [Settings(settings, "Data, plan and network"), Settings(run.get("environment", {}), "Environment")]
    return items
