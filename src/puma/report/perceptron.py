"""The page of `puma perceptron`: simulations of the linear task, their theory, figures and tables of both.

In figures points are simulated (mean and two standard errors over seeds), lines are theory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from puma.io import write_text
from puma.perceptron import collapse_fraction, mislabelled_share, mislabelled_share_after_pruning
from puma.perceptron.experiments import COLLAPSE, LEARNING, PROBE, TRADEOFF, Experiment
from puma.plots import BLUE, INK, MUTED, SKY, figure_style, mark, new_figure
from puma.report.page import Kind, Picture, Report, Table, points, show
from puma.tradeoff import Estimate, Frontier, gap

METRICS = {"clean_error": "clean error", "robust_error": "robust error"}
ABUNDANT, KEPT, SUBJECT = 20.0, 0.6, "puma(0.5)"
"""Examples per dimension in the figures that show one data amount; what the verdict is about."""


@dataclass(frozen=True, repr=False)
class Results:
    """The experiments, their simulated tables, and the theory curves, by name."""

    experiments: Mapping[str, Experiment]
    tables: Mapping[str, pd.DataFrame]
    curves: Mapping[str, pd.DataFrame]


def run_experiments(
    experiments: Sequence[Experiment], out: Path | str, *, workers: int = 1, progress: bool = False
) -> Results:
    """Simulate the experiments (`experiments.DEFAULT` or `FULL`) and compute their theory.

    ``out`` gets a sub-folder per experiment; finished shards in it are reused (`ResumeError` if of another size).
    ``workers`` are processes, ``progress`` is shown on stderr.
    """
    by_name = {one.name: one for one in experiments}
    tables = {name: one.run(Path(out) / name, workers=workers, progress=progress) for name, one in by_name.items()}
    learning, collapse = by_name[LEARNING.name], by_name[COLLAPSE.name]
    keeps = sorted({*np.linspace(0.3, 1, 15).round(3).tolist(), *collapse.keeps})
    alphas = sorted({1.4, *learning.alphas})
    curves = {
        learning.name: learning.theory(learning.strategies, alphas, learning.keeps, workers=workers),
        collapse.name: collapse.theory(("easy",), collapse.alphas, keeps, workers=workers),
    }
    for name, curve in curves.items():
        write_text(Path(out) / name / "theory.csv", curve.to_csv(index=False))
    return Results(by_name, tables, curves)


def write_page(results: Results, out: Path | str, pictures: Path | str | None = None) -> Path:
    """Write ``report.html`` into ``out`` and return its path; figures go as SVG into ``pictures`` (or ``out``)."""
    tables, curves = results.tables, results.curves
    with figure_style():
        figures = {
            "tradeoff": _tradeoff_figure(rows_of(tables["tradeoff"], alpha=ABUNDANT)),
            "mislabelling": _mislabelling_figure(),
            "collapse": _collapse_figure(tables["collapse"], curves["collapse"], tables["ends"]),
            "learning": _learning_figure(tables["learning"], curves["learning"]),
        }
    report = Report("perceptron.html.j2", "PUMA on a linear task", tables=_tables(results))

    def figure(name: str, caption: str, alt: str) -> tuple[Picture, str]:
        report.pictures[name] = Picture(figures[name], alt)
        return report.pictures[name], caption

    settings = {name: {k: v for k, v in vars(one).items() if k != "name"} for name, one in results.experiments.items()}
    report.values = {"figure": figure, "experiments": settings, "verdict": _verdict(tables), "strong": SUBJECT}
    page = report.html()
    for name, picture in report.pictures.items():
        write_text(Path(pictures or out) / f"perceptron-{name}.svg", picture.svg)
    write_text(Path(out) / "report.html", page)
    return Path(out) / "report.html"


def rows_of(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows in which each named column has that value."""
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def measure_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """The gap of every strategy and kept share of one data amount to each seed's own uniform-eps frontier.

    Each row holds ``strategy, keep``, the mean accuracies ``clean`` and ``robust``, and ``gap`` (clean accuracy above
    the frontier at equal robust accuracy, mean over seeds; NaN unless all are comparable) with its error ``gap_se``.
    """
    table = table.assign(clean=1 - table["clean_error"], robust=1 - table["robust_error"])
    control = _is_control(table)
    for seed, runs in table[control].groupby("seed"):
        frontier, mine = Frontier("uniform-eps", runs["robust"], runs["clean"]), table["seed"] == seed
        table.loc[mine, "gap"] = gap(table["robust"][mine], table["clean"][mine], [frontier])
    groups = table[~control].groupby(["strategy", "keep"], sort=False)
    means = groups[["clean", "robust"]].mean()
    comparable = groups["gap"].count() == groups.size()
    means["gap"], means["gap_se"] = (found.where(comparable) for found in (groups["gap"].mean(), groups["gap"].sem()))
    return means.reset_index()


def _verdict(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What the simulations show, in sentences with numbers; intervals are two standard errors."""
    runs = rows_of(tables[TRADEOFF.name], alpha=ABUNDANT)
    keep = min(set(runs[runs["strategy"] == SUBJECT]["keep"]), key=lambda share: abs(share - KEPT))
    mine, none = (rows_of(runs, strategy=name, keep=kept) for name, kept in ((SUBJECT, keep), ("none", 1.0)))
    clean, robust = (none[metric].mean() - mine[metric].mean() for metric in METRICS)
    above = next(row for row in _cells(runs) if row[:2] == [SUBJECT, keep])[-1]
    free = "not comparable" if above is None else f"{points(above, 'clean')} at equal robustness"
    learned = rows_of(tables["ends"], alpha=ABUNDANT)
    least = min(learned["keep"])
    ends = [100 * rows_of(learned, strategy=name, keep=least)["robust_error"].mean() for name in ("easy", SUBJECT)]
    return [
        f"`{SUBJECT}` with {100 * (1 - keep):.0f} % fewer examples: clean {show(clean, 'points')} points and robust "
        f"{show(robust, 'points')} points against training on everything at full eps.",
        f"Against the free control (all data with a smaller uniform eps): {free}.",
        f"Without the smaller eps on low margins, pruning the easiest {100 * (1 - least):.0f} % (on the task without a "
        f"trade-off) ends with a robust error of {ends[0]:.0f} %; with it, {ends[1]:.0f} %.",
    ]


def _tables(results: Results) -> dict[str, Table]:
    heads: dict[str, Kind] = {"strategy": "text", "kept": "percent", "clean accuracy": "percent"}
    heads |= {"robust accuracy": "percent", "clean against free control": "points"}
    tradeoff = results.tables[TRADEOFF.name]
    every = [[a, *row] for a, runs in tradeoff.groupby("alpha") for row in _cells(runs)]
    main = [row for row in _cells(rows_of(tradeoff, alpha=ABUNDANT)) if row[1] in (KEPT, 1.0)]
    all_heads: dict[str, Kind] = {"examples per dimension": "number", **heads}
    return {"strategies": Table(heads, main), "gaps": Table(all_heads, every)}


def _cells(runs: pd.DataFrame) -> list[list[Any]]:
    """Rows of `measure_gaps` with the gap as an estimate of two standard errors, None where not comparable."""
    cells = []
    for strategy, keep, clean, robust, above, error in measure_gaps(runs).itertuples(index=False):
        half = 2 * np.nan_to_num(error)
        found = None if np.isnan(above) else Estimate(above, above - half, above + half, runs["seed"].nunique())
        cells.append([strategy, keep, clean, robust, found])
    return cells


def _learning_figure(simulated: pd.DataFrame, theory: pd.DataFrame) -> Figure:
    """Clean and robust error over the amount of data, one colour per strategy."""
    figure, panels = new_figure(9.0, 3.9, columns=2)
    for axes, (metric, name) in zip(panels, METRICS.items(), strict=True):
        for strategy in LEARNING.strategies:
            _line(axes, rows_of(theory, strategy=strategy), "alpha", metric, mark(_base(strategy)).colour)
            _points(axes, rows_of(simulated, strategy=strategy), "alpha", metric, strategy)
        axes.set(xscale="log", xlabel="data before pruning, examples per dimension", title=name.capitalize())
        ticks = sorted(set(simulated["alpha"]))
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        _percent(axes)
    panels[1].legend(loc="upper right")
    return figure


def _mislabelling_figure(eps: float = 0.3) -> Figure:
    """Closed forms of the mislabelled share over the kept share."""
    figure, (axes,) = new_figure(5.0, 3.8)
    keep = np.linspace(0.02, 1, 150)
    for end, strategy, label in (("high", "easy", "easy examples pruned"), ("low", "difficult", "difficult pruned")):
        for angle, style, note in ((0.0, "-", "perfect probe"), (PROBE, "--", "probe at 20°")):
            share = mislabelled_share_after_pruning(eps, keep, end, angle)  # type: ignore[arg-type]  # a Literal
            axes.plot(keep, share, color=mark(strategy).colour, ls=style, label=f"{label}, {note}")
    axes.axhline(float(mislabelled_share(eps)), color=mark("random").colour, label="random examples pruned")
    axes.axhline(0.5, color=MUTED, lw=0.8, ls=":")
    axes.text(0.99, 0.515, "half wrong: training collapses", color=MUTED, ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="kept share", ylabel="mislabelled share of kept data", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"Pruning concentrates wrong labels (eps {eps:g})")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.98))
    _percent(axes, x=True)
    return figure


def _collapse_figure(perfect: pd.DataFrame, theory: pd.DataFrame, learned: pd.DataFrame) -> Figure:
    """Left: collapse with a perfect probe, theory and simulation. Right: with a learned one, and the cap's recovery."""
    figure, (left, right) = new_figure(9.0, 4.0, columns=2)
    for eps, colour in zip(sorted(set(perfect["eps"])), (SKY, BLUE, INK), strict=False):
        _line(left, rows_of(theory, eps=eps, strategy="easy"), "keep", "clean_error", colour)
        runs = rows_of(perfect, eps=eps, strategy="easy")
        _points(left, runs, "keep", "clean_error", "easy", label=f"eps {eps:g}", color=colour, markerfacecolor=colour)
        left.axvline(float(collapse_fraction(eps)), color=colour, lw=0.8, ls="--")
    left.set_title("Easy examples pruned by a perfect probe")
    left.legend(loc="upper right", title="vertical: collapse law", title_fontsize=8)
    learned = rows_of(learned, alpha=ABUNDANT)
    for strategy in ("easy", "random", "difficult", "puma(0.5)", "puma-plus"):
        _points(right, rows_of(learned, strategy=strategy), "keep", "clean_error", strategy, joined=True)
    none = float(rows_of(learned, strategy="none")["clean_error"].mean())
    right.axhline(none, color=mark("none").colour, lw=1, label="none (all data)")
    right.set_title("Margins learned on the same data, eps 0.3")
    right.legend(loc="upper right")
    for axes in (left, right):
        axes.set(xlabel="kept share", ylabel="clean error", ylim=(0, 0.53))
        _percent(axes, x=True)
    return figure


def _tradeoff_figure(table: pd.DataFrame) -> Figure:
    """Accuracies against each other, with the frontier of the free control."""
    figure, (axes,) = new_figure(5.0, 4.0)
    means = 1 - table[_is_control(table)].groupby("strategy")[list(METRICS)].mean()
    means = means.sort_values("clean_error")
    look: dict[str, Any] = {"color": INK, "mfc": "none", "ms": 5, "label": "all data, smaller uniform eps"}
    axes.plot(means["robust_error"], means["clean_error"], "-o", **look)
    full = means.loc["none"]
    axes.annotate("none", (full["robust_error"], full["clean_error"]), (8, 0), textcoords="offset points", va="center")
    for row in measure_gaps(table).sort_values(["strategy", "keep"], ascending=[True, False]).to_dict("records"):
        base = _base(row["strategy"])
        if row["clean"] > 0.55:  # a collapsed student would hide the rest
            label = None if base in axes.get_legend_handles_labels()[1] else base
            look = mark(base).dot | {"ms": 5 + 5 * (row["keep"] - 0.4)}
            axes.plot(row["robust"], row["clean"], ls="", label=label, **look)
    axes.set(xlabel="robust accuracy →", ylabel="clean accuracy →", title="Larger marker: more data kept")
    axes.margins(x=0.08)
    axes.legend(loc="lower left", fontsize=7.5)
    _percent(axes, x=True)
    return figure


def _base(strategy: str) -> str:
    return strategy.split("(")[0]


def _is_control(table: pd.DataFrame) -> pd.Series[bool]:
    """Rows of the strategies that trace the frontier of the free control."""
    return table["strategy"].map(_base).isin(("none", "uniform-eps"))


def _line(axes: Axes, table: pd.DataFrame, over: str, metric: str, colour: str) -> None:
    """A theory curve: solid where it is reliable, dotted where not."""
    table = table.sort_values(over)
    axes.plot(table[over], table[metric], color=colour, lw=1, ls=":")
    axes.plot(table[over], table[metric].where(table["reliable"]), color=colour, lw=1.3)


def _points(
    axes: Axes, table: pd.DataFrame, over: str, metric: str, strategy: str, joined: bool = False, **options: Any
) -> None:
    """Simulated means with bars of two standard errors."""
    means = table.groupby(over)[metric].agg(["mean", "sem"])
    look: dict[str, Any] = mark(_base(strategy)).dot | {"ms": 4.5, "lw": 1, "label": strategy} | options
    bars = 2 * means["sem"].fillna(0)
    axes.errorbar(means.index, means["mean"], yerr=bars, ls="-" if joined else "", **look)


def _percent(axes: Axes, x: bool = False) -> None:
    for axis in (axes.yaxis, axes.xaxis)[: 1 + x]:
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
