"""The page of one run: its evaluation, its training curves, its settings."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from puma.io import read_json, read_toml
from puma.plots import figure_style
from puma.report.page import Kind, Picture, Report, Table
from puma.report.plots import training_figure
from puma.tradeoff import Estimate

# panel -> columns of metrics.csv, with their names in the panel
_PANELS: dict[str, dict[str, str]] = {
    "training loss": {"loss": "loss"},
    "accuracy on training batches, %": {"clean_accuracy": "clean", "adversarial_accuracy": "under the training attack"},
    "accuracy on validation images, %": {"validation_clean": "clean", "validation_robust": "under PGD"},
    "learning rate": {"learning_rate": "learning rate"},
}


def run_report(folder: Path) -> Report:
    """The report of a run; of an unfinished one, as far as it is. `DataError` if its files are broken."""
    evaluations: list[tuple[str, dict[str, Any]]] = []
    for checkpoint, place in (("last", folder), ("best", folder / "best")):
        paths = sorted(place.glob("evaluation*.json"), key=lambda path: path.stem)
        there = [dict(read_json(path)) for path in paths]
        standard = [evaluation for evaluation in there if evaluation.get("attack") == "standard"]
        # where AutoAttack standard was not run, those of weaker attacks
        evaluations += [(checkpoint, evaluation) for evaluation in standard or there]
    several = len({str(evaluation.get("threat")) for _, evaluation in evaluations}) > 1

    def attack_of(evaluation: dict[str, Any]) -> str:
        attack = str(evaluation.get("attack", ""))
        return f"{attack}, {(evaluation.get('threat') or {}).get('text')}" if several else attack

    def accuracy(evaluation: dict[str, Any], name: str, interval: str) -> Estimate | None:
        low, high = evaluation.get(interval) or (None, None)
        return None if evaluation.get(name) is None else Estimate(evaluation[name], low, high, 1)

    settings = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    others = {name: value for name, value in settings.get("settings", {}).items() if not name.startswith("recipe.")}
    report, curves = Report("run.html.j2", f"Run {folder.resolve().name}"), read_curves(folder / "metrics.csv")
    steps, best = curves["step"].to_numpy(), best_step(curves)
    report.values = {
        "finished": (folder / "last.safetensors").is_file(),
        "steps": int(steps[-1]) if len(steps) else 0,
        "threat": others.get("threat"),
        "best": best,
        "evaluation": evaluations[0] if evaluations else None,
        "weaker": sorted({str(found.get("attack")) for _, found in evaluations} - {"standard", "clean"}),
        "settings": {
            "Recipe": read_toml(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else {},
            "Data, plan and network": others,
            "Environment": settings.get("environment", {}),
            **{f"Evaluation of the {where} checkpoint ({attack_of(found)})": found for where, found in evaluations},
        },
    }
    if len(steps):
        with figure_style():
            figure = training_figure(_panels(curves), best)
        report.pictures["training"] = Picture(figure, f"Training curves over {steps[-1]:.0f} steps.")
    if evaluations:
        rows = []
        for checkpoint, found in evaluations:
            clean = accuracy(found, "clean_accuracy", "clean_interval")
            attacked = accuracy(found, "attacked_accuracy", "robust_interval")
            rows.append([checkpoint, attack_of(found), clean, attacked, found.get("n_test"), found.get("n_clean")])
        kinds: dict[str, Kind] = {"checkpoint": "text", "attack": "text", "clean": "percent", "under attack": "percent"}
        kinds |= {"images attacked": "number", "images for clean": "number"}
        report.tables["evaluation"] = Table(kinds, rows)
    return report


def read_curves(path: Path) -> pd.DataFrame:
    """The columns of a ``metrics.csv`` as numbers, NaN for none; cut-off lines are left out."""
    with path.open(newline="", errors="replace") as file:
        frame = pd.DataFrame([{name: cell for name, cell in row.items() if name} for row in csv.DictReader(file)])
    frame = pd.DataFrame(frame.apply(pd.to_numeric, errors="coerce"), dtype=float)
    frame = frame if "step" in frame else frame.assign(step=np.nan)
    return pd.DataFrame(frame[np.isfinite(frame["step"])])


def best_step(curves: pd.DataFrame) -> int | None:
    """The step of the best checkpoint: highest robust accuracy on validation images, the later of equals."""
    robust = curves["validation_robust"].to_numpy() if "validation_robust" in curves else np.array([])
    if not np.isfinite(robust).any():
        return None
    return int(curves["step"].iloc[np.flatnonzero(robust == np.nanmax(robust))[-1]])


def _panels(curves: pd.DataFrame) -> dict[str, dict[str, tuple[Any, Any]]]:
    """The curves of each panel that has any: label -> (steps, values)."""
    panels: dict[str, dict[str, tuple[Any, Any]]] = {}
    for title, names in _PANELS.items():
        for column, label in names.items():
            if column in curves and len(known := curves[["step", column]].dropna()):
                values = known[column] * (100.0 if title.endswith("%") else 1.0)
                panels.setdefault(title, {})[label] = known["step"].to_numpy(), values.to_numpy()
    return panels
