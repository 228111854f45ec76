"""The section on training: curves of the runs, with the best and the last checkpoint."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puma.report.content import Item, Picture, Section, Table
from puma.report.distributions import training_curves
from puma.report.materials import Materials
from puma.report.results import Arm
from puma.report.style import house_style
from puma.tradeoff import BASELINE, CONTROLS

STEP = "step"
_SHOWN = {
    "loss": "training loss",
    "clean_accuracy": "clean accuracy, training batches",
    "adversarial_accuracy": "accuracy under the training attack, training batches",
    "validation_clean": "clean accuracy, validation images",
    "validation_robust": "robust accuracy (PGD), validation images",
    "learning_rate": "learning rate",
}
_MOST_RUNS = 10
_FIRST = (BASELINE, "random", "easy", "difficult", "puma", "puma-plus", "tilt")

Columns = Mapping[str, NDArray[np.float64]]


def read_curves(path: Path | str) -> dict[str, NDArray[np.float64]]:
    """The columns of a ``metrics.csv`` as float64 ``[rows]``, NaN for none; cut-off lines are left out."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else {}) if name]
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in names}
    whole = np.isfinite(columns[STEP]) if STEP in columns else np.zeros(len(rows), dtype=bool)
    return {name: column[whole] for name, column in columns.items()}


def best_step(columns: Columns) -> int | None:
    """The step of the best checkpoint: highest robust accuracy on validation images, the later of equals."""
    robust = columns.get("validation_robust")
    if robust is None or not np.isfinite(robust).any():
        return None
    return int(columns[STEP][np.flatnonzero(robust == np.nanmax(robust))[-1]])


def curve_items(runs: Mapping[str, Columns]) -> list[Item]:
    """The curves of some runs as one picture, and what they end in as a table.

    Args:
        runs: label -> columns of its ``metrics.csv``.
    """
    alone = len(runs) == 1
    shown = {label: _named(columns, alone) for label, columns in runs.items() if len(columns.get(STEP, ()))}
    if not shown:
        return []
    best = {label: step for label in shown if (step := best_step(runs[label])) is not None}
    with house_style():
        figure = training_curves(shown, best, STEP)
    rows = [[label, best.get(label), *_ends(runs[label], best.get(label))] for label in shown]
    dots = "A dot marks the checkpoint with the best robust accuracy on validation images." if best else (
        "No validation images were held out: the last checkpoint is the best one."
    )  # fmt: skip
    head = ["run", "best step", "last step", "loss, last", "validation robust, best", "validation robust, last"]
    alt = "; ".join(f"{row[0]}: {row[2]:.0f} steps" for row in rows)
    return [
        Picture("training", figure, f"Training, from `metrics.csv`. {dots}", f"Training curves. {alt}."),
        Table("training", head, rows, "Where training ended. Comparisons use the last checkpoint, reports show both."),
    ]


def training_section(materials: Materials, chosen: Sequence[Arm]) -> Section:
    """The curves of the main arms at their first seed, ten at most."""
    runs: dict[str, Columns] = {}
    found = 0
    for arm in sorted(chosen, key=_rank):
        folder = materials.run_folder(arm.first)
        if folder and (folder / "metrics.csv").is_file():
            found += 1
            if len(runs) < _MOST_RUNS:
                runs[arm.label] = read_curves(folder / "metrics.csv")
    items = curve_items(runs)
    if found > len(runs):
        items.insert(
            0, f"The first seed of {len(runs)} of {found} arms; the others' curves are in their runs' folders."
        )
    return Section("Training", items)


def _rank(arm: Arm) -> int:
    """Which arms are shown where there is no room for all: our own and the usual ones, then others, then the dials."""
    if arm.strategy in _FIRST:
        return 0
    return 2 if arm.strategy in CONTROLS else 1


def _named(columns: Columns, alone: bool) -> dict[str, NDArray[np.float64]]:
    """The columns worth a panel, by the name of the panel; the recipe's schedule only where there is one run."""
    known = {name for name, column in columns.items() if np.isfinite(column).any()}
    known -= set() if alone else {"learning_rate"}
    return {STEP: columns[STEP], **{words: columns[name] for name, words in _SHOWN.items() if name in known}}


def _ends(columns: Columns, best: float | None) -> list[float | None]:
    robust = columns.get("validation_robust", np.array([]))
    at_best = float(np.nanmax(robust)) if best is not None else None
    return [int(columns[STEP][-1]), _last(columns.get("loss")), at_best, _last(robust)]


def _last(column: NDArray[np.float64] | None) -> float | None:
    known = column[np.isfinite(column)] if column is not None else np.array([])
    return float(known[-1]) if len(known) else None


def _number(text: str | None) -> float:
    try:
        return float(text) if text else float("nan")
    except ValueError:
        return float("nan")
