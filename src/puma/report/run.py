"""The page of one run: its evaluation, its training curves, its settings."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from puma.io import read_json, read_toml
from puma.plots import figure_style
from puma.report.page import Kind, Picture, Report, Table
from puma.report.plots import training_figure
from puma.tradeoff import Estimate

STEP = "step"
Columns = Mapping[str, NDArray[np.float64]]

# panel -> columns, with their names where the panel shows one run
_PANELS: dict[str, dict[str, str]] = {
    "training loss": {"loss": "loss"},
    "accuracy on training batches, %": {"clean_accuracy": "clean", "adversarial_accuracy": "under the training attack"},
    "accuracy on validation images, %": {"validation_clean": "clean", "validation_robust": "under PGD"},
    "learning rate": {"learning_rate": "learning rate"},
}


def run_report(folder: Path) -> Report:
    """The report of a run; of an unfinished one, as far as it is.

    Raises:
        DataError: its files are broken.
    """
    columns = read_curves(folder / "metrics.csv")
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
    report = Report("run.html.j2", f"Run {folder.resolve().name}")
    report.values = {
        "finished": (folder / "last.safetensors").is_file(),
        "steps": int(columns[STEP][-1]) if len(columns.get(STEP, ())) else 0,
        "evaluation": evaluations[0] if evaluations else None,
        "weaker": sorted({str(found.get("attack")) for _, found in evaluations} - {"standard", "clean"}),
        "settings": {
            "Recipe": read_toml(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else {},
            "Data, plan and network": others,
            "Environment": settings.get("environment", {}),
            **{f"Evaluation of the {where} checkpoint ({attack_of(found)})": found for where, found in evaluations},
        },
    }
    curves = {folder.resolve().name: columns}
    if picture := training_picture(curves):
        report.pictures["training"], report.tables["training"] = picture, training_table(curves)
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


def read_curves(path: Path | str) -> dict[str, NDArray[np.float64]]:
    """The columns of a ``metrics.csv`` as float64 ``[rows]``, NaN for none; cut-off lines are left out."""
    with Path(path).open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else {}) if name]
    columns = {name: _numbers([row.get(name) for row in rows]) for name in names}
    complete = np.isfinite(columns[STEP]) if STEP in columns else np.zeros(len(rows), dtype=bool)
    return {name: column[complete] for name, column in columns.items()}


def _numbers(cells: list[str | None]) -> NDArray[np.float64]:
    return np.asarray(pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce"), np.float64)


def best_step(columns: Columns) -> int | None:
    """The step of the best checkpoint: highest robust accuracy on validation images, the later of equals."""
    robust = columns.get("validation_robust")
    if robust is None or not np.isfinite(robust).any():
        return None
    return int(columns[STEP][np.flatnonzero(robust == np.nanmax(robust))[-1]])


def training_picture(runs: Mapping[str, Columns]) -> Picture | None:
    """Training curves of one run or several; None where there is no step."""
    runs = {label: columns for label, columns in runs.items() if len(columns.get(STEP, ()))}
    if not runs:
        return None
    alone, panels = len(runs) == 1, dict[str, dict[str, tuple[Any, Any]]]()
    for title, names in _PANELS.items():
        for column, words in names.items():
            if not alone and column == "learning_rate":
                continue  # the recipe's, the same for all
            for label, columns in runs.items():
                values = columns.get(column, np.array([])) * (100.0 if title.endswith("%") else 1.0)
                known = np.isfinite(values)
                if known.any():
                    panel = panels.setdefault(title if alone or words in title else f"{words}: {title}", {})
                    panel[words if alone else label] = columns[STEP][known], values[known]
    best = {label: step for label, columns in runs.items() if (step := best_step(columns)) is not None}
    if alone:
        best = dict.fromkeys(("clean", "under PGD"), next(iter(best.values()))) if best else {}
    with figure_style():
        figure = training_figure(panels, best)
    alt = "; ".join(f"{label}: {columns[STEP][-1]:.0f} steps" for label, columns in runs.items())
    return Picture(figure, f"Training curves. {alt}.")


def training_table(runs: Mapping[str, Columns]) -> Table:
    """Where training ended."""

    def last(column: NDArray[np.float64]) -> float | None:
        known = column[np.isfinite(column)]
        return float(known[-1]) if len(known) else None

    rows = []
    for label, columns in runs.items():
        loss, robust = (columns.get(name, np.array([])) for name in ("loss", "validation_robust"))
        best = best_step(columns)
        at_best = float(np.nanmax(robust)) if best is not None else None
        rows.append([label, best, int(columns[STEP][-1]), last(loss), at_best, last(robust)])
    kinds: dict[str, Kind] = {
        "run": "text", "best step": "number", "last step": "number", "loss, last": "number",
        "validation robust, best": "percent", "validation robust, last": "percent",
    }  # fmt: skip
    return Table(kinds, rows)
