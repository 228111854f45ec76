"""The page of `puma perceptron`: simulations of the linear task, their theory, and the tables of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from puma.io import write_text
from puma.perceptron import collapse_fraction
from puma.perceptron.experiments import COLLAPSE, LEARNING, NONROBUST, TRADEOFF, UNIFORM_EPS, Experiment
from puma.plots import figure_style
from puma.report.html import Picture, render
from puma.report.perceptron_plots import (
    METRICS,
    collapse_figure,
    ends_figure,
    learning_figure,
    measure_gaps,
    mislabelling_figure,
    rows_of,
    tradeoff_figure,
)
from puma.report.tables import Kind, Table

if TYPE_CHECKING:
    import pandas as pd

ABUNDANT = 20.0
"""Examples per dimension in the figures that show one data amount."""
_AMOUNTS = (2.0, 5.0, ABUNDANT)


@dataclass(frozen=True, repr=False)
class Results:
    """The experiments, their simulated tables, and the theory curves, by name."""

    experiments: Mapping[str, Experiment]
    tables: Mapping[str, pd.DataFrame]
    curves: Mapping[str, pd.DataFrame]


def run_experiments(
    experiments: Sequence[Experiment], out: Path | str, *, workers: int = 1, progress: bool = False
) -> Results:
    """Simulate the experiments and compute their theory; finished shards in ``out`` are reused.

    Args:
        experiments: `experiments.DEFAULT` or `experiments.FULL`.
        out: folder; one sub-folder per experiment.
        workers: processes.
        progress: show progress on stderr.

    Raises:
        ResumeError: ``out`` holds experiments of another size.
        StorageError: ``out`` cannot be written.
    """
    by_name = {one.name: one for one in experiments}
    tables = {name: one.run(Path(out) / name, workers=workers, progress=progress) for name, one in by_name.items()}
    learning, collapse, tradeoff = (by_name[one.name] for one in (LEARNING, COLLAPSE, TRADEOFF))
    keeps = sorted({*np.linspace(0.3, 1, 15).round(3).tolist(), *collapse.keeps})
    alphas = sorted({1.4, *learning.alphas})
    curves = {
        learning.name: learning.theory(learning.strategies, alphas, learning.keeps, workers=workers),
        collapse.name: collapse.theory(("easy",), collapse.alphas, keeps, workers=workers),
        tradeoff.name: tradeoff.theory(("none", *UNIFORM_EPS), (ABUNDANT,), (1.0,), workers=workers),
    }
    for name, curve in curves.items():
        write_text(Path(out) / name / "theory.csv", curve.to_csv(index=False))
    return Results(by_name, tables, curves)


def write_page(results: Results, out: Path | str, pictures: Path | str | None = None) -> Path:
    """Write ``report.html`` into ``out``, and the figures as SVG files into ``pictures`` (``out`` if None).

    Returns:
        The page's path.
    """
    figures, pictures_of = make_figures(results), dict[str, Picture]()

    def figure(name: str, caption: str, alt: str) -> tuple[Picture, str]:
        pictures_of[name] = Picture(figures[name], alt)
        return pictures_of[name], caption

    settings = {
        name: {key: value for key, value in vars(one).items() if key != "name"}
        for name, one in results.experiments.items()
    }
    page = render("perceptron.html.j2", figure=figure, tables=_tables(results), experiments=settings)
    for name, picture in pictures_of.items():
        write_text(Path(pictures or out) / f"perceptron-{name}.svg", picture.svg)
    write_text(Path(out) / "report.html", page)
    return Path(out) / "report.html"


def make_figures(results: Results) -> dict[str, Figure]:
    """Every figure of the page, by name."""
    tables, curves = results.tables, results.curves
    with figure_style():
        return {
            "mislabelling": mislabelling_figure(),
            "ends": ends_figure(tables["ends"], tables["tradeoff"], _AMOUNTS),
            "collapse": collapse_figure(tables["collapse"], curves["collapse"], tables["ends"], ABUNDANT),
            "tradeoff": tradeoff_figure(rows_of(tables["tradeoff"], alpha=ABUNDANT), curves["tradeoff"]),
            "learning": learning_figure(tables["learning"], curves["learning"], LEARNING.strategies),
        }


def compare_theory(results: Results) -> pd.DataFrame:
    """Theory minus simulation where both exist on the learning grid, in units of 1.

    Each row holds ``strategy, alpha, reliable``, and of both errors the difference and the simulation's standard error
    (``clean_error, clean_error_se``, ...).
    """
    keys = ["strategy", "alpha", "keep", "eps"]
    errors = results.tables[LEARNING.name].groupby(keys)[list(METRICS)]
    simulated = errors.mean().add_suffix("_simulated").join(errors.sem().add_suffix("_se"))
    table = results.curves[LEARNING.name].join(simulated, on=keys, how="inner")
    for metric in METRICS:
        table[metric] -= table[f"{metric}_simulated"]
    return table[["strategy", "alpha", "reliable", *(name for m in METRICS for name in (m, f"{m}_se"))]]


def compare_collapse(results: Results) -> list[dict[str, float]]:
    """For each eps: the collapse law, and the kept shares where theory and simulation collapse.

    ``simulated`` and ``predicted`` are the largest kept share at which at least half of the seeds, and the limit at
    this data amount, end at ``w = 0``; 0 where none does. Both are on the experiment's grid of kept shares.
    """
    simulated = rows_of(results.tables[COLLAPSE.name], strategy="easy")
    curve = results.curves[COLLAPSE.name]
    rows = []
    for eps in sorted(set(simulated["eps"])):
        share = rows_of(simulated, eps=eps).groupby("keep")["collapsed"].mean()
        predicted = curve[(curve["eps"] == eps) & curve["collapsed"] & curve["keep"].isin(share.index)]["keep"]
        simulated_at = share.index[share >= 0.5]
        law = float(collapse_fraction(eps))
        ends = {"predicted": max(predicted, default=0.0), "simulated": max(simulated_at, default=0.0)}
        rows.append({"eps": eps, "law": law, **ends})
    return rows


def _tables(results: Results) -> dict[str, Table]:
    percent: dict[str, Kind] = dict.fromkeys(("kept", "clean accuracy", "robust accuracy"), "percent")
    gap: dict[str, Kind] = {"strategy": "text", **percent, "gap": "points", "standard error": "points"}
    law = ("law, unlimited data", "predicted at this data amount", "in simulation")
    errors: dict[str, Kind] = dict.fromkeys(("clean", "its standard error", "robust", "standard error"), "points")
    theory = [
        [strategy, alpha, *values, "yes" if reliable else "no"]
        for strategy, alpha, reliable, *values in compare_theory(results).to_numpy().tolist()
    ]
    gaps = [
        [alpha, *_cells(row)]
        for alpha, runs in results.tables[TRADEOFF.name].groupby("alpha")
        for row in measure_gaps(runs).to_numpy().tolist()
    ]
    nonrobust = measure_gaps(results.tables[NONROBUST.name]).to_numpy().tolist()
    collapse = [list(row.values()) for row in compare_collapse(results)]
    return {
        "collapse": Table({"eps": "number", **dict.fromkeys(law, "percent")}, collapse),
        "gaps": Table({"alpha": "number", **gap}, gaps),
        "nonrobust": Table(gap, [_cells(row) for row in nonrobust]),
        "theory": Table({"strategy": "text", "alpha": "number", **errors, "reliable": "text"}, theory),
    }


def _cells(row: list[object]) -> list[object]:
    return [None if value != value else value for value in row]  # NaN: not comparable
