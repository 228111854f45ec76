"""Figures of the linear task: points are simulated (mean and standard error over seeds), lines are theory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from puma.perceptron import collapse_fraction, mislabelled_share, mislabelled_share_after_pruning
from puma.perceptron.experiments import PROBE
from puma.plots import BLUE, GREEN, INK, MUTED, RED, SKY, mark, new_figure
from puma.tradeoff import Frontier

if TYPE_CHECKING:
    import pandas as pd

METRICS = {"clean_error": "clean error", "robust_error": "robust error"}
CONTROL = ("none", "uniform-eps")
"""Strategies, without their parameters, that trace the frontier of the free control."""


def rows_of(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows in which each named column has that value."""
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def learning_figure(simulated: pd.DataFrame, theory: pd.DataFrame, strategies: Sequence[str]) -> Figure:
    """Clean and robust error over the amount of data, one colour per strategy."""
    figure, panels = new_figure(9.0, 3.9, columns=2)
    for axes, (metric, name) in zip(panels, METRICS.items(), strict=True):
        for strategy in strategies:
            _line(axes, rows_of(theory, strategy=strategy), "alpha", metric, mark(_base(strategy)).colour)
            _points(axes, rows_of(simulated, strategy=strategy), "alpha", metric, strategy)
        axes.set(xscale="log", xlabel="data before pruning, examples per dimension", ylabel=f"{name} (lower is better)")
        axes.set(title=name.capitalize())
        ticks = sorted(set(simulated["alpha"]))
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.minorticks_off()
        _percent(axes)
    panels[1].legend(loc="upper right")
    return figure


def mislabelling_figure(eps: float = 0.3) -> Figure:
    """Closed forms. Left: mislabelled share over the kept share. Right: the kept share at which training collapses."""
    figure, (axes, right) = new_figure(9.0, 3.8, columns=2)
    keep = np.linspace(0.02, 1, 150)
    for end, strategy, label in (("high", "easy", "easy examples pruned"), ("low", "difficult", "difficult pruned")):
        for angle, style, note in ((0.0, "-", "perfect probe"), (PROBE, "--", "probe at 20°")):
            share = mislabelled_share_after_pruning(eps, keep, end, angle)  # type: ignore[arg-type]
            axes.plot(keep, share, color=mark(strategy).colour, ls=style, label=f"{label}, {note}")
    axes.axhline(float(mislabelled_share(eps)), color=mark("random").colour, label="random examples pruned")
    axes.axhline(0.5, color=MUTED, lw=0.8, ls=":")
    axes.text(0.99, 0.515, "half wrong: training collapses", color=MUTED, ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="kept share", ylabel="mislabelled share of kept data", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f"Pruning concentrates wrong labels (eps {eps:g})")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.98))
    _percent(axes, x=True)
    values = np.linspace(0, 0.8, 120)
    critical = collapse_fraction(values)
    right.fill_between(values, 0, critical, color=RED, alpha=0.14, lw=0)
    right.plot(values, critical, color=RED, label="collapse law")
    twice = np.minimum(1, 2 * mislabelled_share(values))
    right.plot(values, twice, color=INK, ls=":", label="twice the mislabelled share")
    right.text(0.5, 0.3, "adversarial training on the\nkept examples collapses", color=RED, ha="center", fontsize=8.5)
    right.set(xlabel="eps", ylabel="kept share (easy examples pruned)", xlim=(0, 0.8), ylim=(0, 1.02))
    right.set_title("What must be kept without a cap")
    right.legend(loc="upper left")
    _percent(right)
    return figure


def collapse_figure(perfect: pd.DataFrame, theory: pd.DataFrame, learned: pd.DataFrame, alpha: float) -> Figure:
    """Left: collapse with a perfect probe, theory and simulation. Right: with a learned one, and the cap's recovery."""
    figure, (left, right) = new_figure(9.0, 4.0, columns=2)
    for eps, colour in zip(sorted(set(perfect["eps"])), (SKY, BLUE, INK), strict=False):
        _line(left, rows_of(theory, eps=eps, strategy="easy"), "keep", "clean_error", colour)
        runs = rows_of(perfect, eps=eps, strategy="easy")
        _points(left, runs, "keep", "clean_error", "easy", label=f"eps {eps:g}", colour=colour)
        left.axvline(float(collapse_fraction(eps)), color=colour, lw=0.8, ls="--")
    left.set_title("Easy examples pruned by a perfect probe")
    left.legend(loc="upper right", title="vertical: collapse law", title_fontsize=8)
    learned = rows_of(learned, alpha=alpha)
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


def ends_figure(isotropic: pd.DataFrame, anisotropic: pd.DataFrame, alphas: Sequence[float]) -> Figure:
    """Robust error against training on all data, over the kept share; a row per task, a column per data amount."""
    figure, panels = new_figure(9.0, 6.0, rows=2, columns=len(alphas), sharex=True)
    tables = {"isotropic": isotropic, "anisotropic": anisotropic}
    for axes, (name, alpha) in zip(panels, itertools.product(tables, alphas), strict=True):
        part = excess(rows_of(tables[name], alpha=alpha))
        for strategy in ("easy", "difficult", "random", "puma(0.5)"):
            if (
                name == "isotropic" or strategy != "puma(0.5)"
            ):  # there it trades robustness for accuracy: another figure
                _points(axes, rows_of(part, strategy=strategy), "keep", "robust_excess", strategy, joined=True)
        axes.axhline(0, color=mark("none").colour, lw=1, label="none (all data)")
        axes.set(ylim=(-0.03, 0.125), title=f"{name}: {alpha:g} per dimension")
        _percent(axes, x=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}")
    for axes in panels[-len(alphas) :]:
        axes.set_xlabel("kept share")
    for axes in panels[:: len(alphas)]:
        axes.set_ylabel("robust error above none, points")
    panels[len(alphas) - 1].legend(loc="upper right")
    return figure


def excess(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``clean_excess`` and ``robust_excess``: each error minus that of the same seed's ``none``."""
    none = rows_of(table, strategy="none").set_index("seed")
    columns = {m.replace("error", "excess"): table[m] - table["seed"].map(none[m]) for m in METRICS}
    return table.assign(**columns)


def measure_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """The gap of every strategy and kept share of one data amount to each seed's own uniform-eps frontier.

    Returns:
        One row per strategy and kept share: ``strategy, keep``, the means ``clean`` and ``robust`` (accuracies), and
        ``gap`` (clean accuracy above the frontier at equal robust accuracy, mean over seeds; NaN unless every seed is
        comparable) with its standard error ``gap_se``.
    """
    table = table.assign(clean=1 - table["clean_error"], robust=1 - table["robust_error"])
    control = table["strategy"].map(_base).isin(CONTROL)
    frontiers = {
        seed: Frontier("uniform-eps", runs["robust"], runs["clean"]) for seed, runs in table[control].groupby("seed")
    }
    rest = table[~control].copy()
    rest["gap"] = [
        clean - float(frontiers[seed].clean_at(robust))
        for seed, clean, robust in zip(rest["seed"], rest["clean"], rest["robust"], strict=True)
    ]
    rest["comparable"] = rest["gap"].notna()
    groups = rest.groupby(["strategy", "keep"], sort=False)
    means = groups[["clean", "robust", "gap", "comparable"]].mean()
    means["gap"] = means["gap"].where(means.pop("comparable") == 1)
    return means.assign(gap_se=groups["gap"].sem().where(means["gap"].notna())).reset_index()


def tradeoff_figure(table: pd.DataFrame, theory: pd.DataFrame) -> Figure:
    """Left: accuracies against each other, with the frontier. Right: the gap of each strategy to it."""
    figure, (left, right) = new_figure(9.4, 4.8, columns=2)
    control = table[table["strategy"].map(_base).isin(CONTROL)]
    means = 1 - control.groupby("strategy")[list(METRICS)].mean().sort_values("clean_error", ascending=False)
    look: dict[str, Any] = {"color": INK, "mfc": "none", "ms": 5, "label": "all data, smaller uniform eps"}
    left.plot(means["robust_error"], means["clean_error"], "-o", **look)
    curve = 1 - theory.sort_values("robust_error")[list(METRICS)]
    left.plot(curve["robust_error"], curve["clean_error"], color=GREEN, lw=1, ls="--", label="the same, theory")
    gaps = measure_gaps(table).sort_values(["strategy", "keep"], ascending=[True, False])
    for gap in gaps.to_dict("records"):
        base = _base(gap["strategy"])
        if gap["clean"] > 0.55:  # a collapsed student would hide the rest
            label = None if base in left.get_legend_handles_labels()[1] else base
            left.plot(gap["robust"], gap["clean"], **_look(base), ms=5 + 5 * (gap["keep"] - 0.4), label=label)
    left.set(xlabel="robust accuracy", ylabel="clean accuracy", title="Trade-off (larger marker: more data kept)")
    left.legend(loc="lower left", fontsize=7.5)
    _percent(left, x=True)
    shown = gaps[gaps["gap"].notna()].iloc[::-1].to_dict("records")
    for place, gap in enumerate(shown):
        bar = 200 * np.nan_to_num(gap["gap_se"])
        right.errorbar(100 * gap["gap"], place, xerr=bar, **_look(_base(gap["strategy"])), ms=5, lw=1)
    right.axvline(0, color=INK, lw=1)
    names = [f"{gap['strategy']}, {gap['keep']:.0%} kept" for gap in shown]
    right.set_yticks(range(len(names)), names, fontsize=7)
    right.set(xlabel="points of clean accuracy above the frontier\nat equal robust accuracy (bars: 2 standard errors)")
    right.set_title("Gap to the free control")
    return figure


def _base(strategy: str) -> str:
    return strategy.split("(")[0]


def _look(strategy: str) -> dict[str, Any]:
    look = mark(strategy)
    return {"marker": look.marker, "color": look.colour, "mfc": look.face, "ls": ""}


def _line(axes: Axes, table: pd.DataFrame, over: str, metric: str, colour: str) -> None:
    """A theory curve: solid where it is reliable, dotted where not."""
    table = table.sort_values(over)
    axes.plot(table[over], table[metric], color=colour, lw=1, ls=":")
    axes.plot(table[over], table[metric].where(table["reliable"]), color=colour, lw=1.3)


def _points(
    axes: Axes,
    table: pd.DataFrame,
    over: str,
    metric: str,
    strategy: str,
    *,
    label: str | None = None,
    colour: str | None = None,
    joined: bool = False,
) -> None:
    """Simulated means with bars of two standard errors."""
    look = mark(_base(strategy))
    means = table.groupby(over)[metric].agg(["mean", "sem"])
    axes.errorbar(
        means.index,
        means["mean"],
        yerr=2 * means["sem"].fillna(0),
        color=colour or look.colour,
        marker=look.marker,
        mfc="none" if look.hollow else colour or look.colour,
        ms=4.5,
        lw=1,
        ls="-" if joined else "",
        label=label or strategy,
    )


def _percent(axes: Axes, x: bool = False) -> None:
    for axis in (axes.yaxis, axes.xaxis)[: 1 + x]:
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
