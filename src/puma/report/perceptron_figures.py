"""The figures of the perceptron laboratory: points are simulated (mean and standard error over seeds), lines theory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from puma.perceptron import collapse_fraction, mislabelled_share, mislabelled_share_after_pruning
from puma.perceptron.experiments import DIALS, PROBE
from puma.perceptron.table import Table
from puma.report.style import BLUE, GREEN, INK, MUTED, RED, SKY, mark, new_figure
from puma.tradeoff import Frontier

_METRICS = {"clean_error": "clean error", "robust_error": "robust error"}
FRONTIER = ("none", *DIALS, "uniform-eps(0)")


def draw_learning(simulated: Table, theory: Table, strategies: Sequence[str]) -> Figure:
    """Clean and robust error over the amount of data, one colour per strategy."""
    figure, panels = new_figure(9.0, 3.9, columns=2)
    for axes, (metric, name) in zip(panels, _METRICS.items(), strict=True):
        for strategy in strategies:
            _line(axes, theory.where(strategy=strategy), "alpha", metric, strategy)
            _points(axes, simulated.where(strategy=strategy), "alpha", metric, strategy)
        axes.set(xscale="log", xlabel="data before pruning, examples per dimension", ylabel=f"{name} (lower is better)")
        _ticks(axes, simulated.values("alpha"))
        _percent(axes)
    panels[0].set_title("Clean error")
    panels[1].set_title("Robust error")
    panels[1].legend(loc="upper right")
    return figure


def draw_mislabelling() -> Figure:
    """Closed forms: the share of kept examples that the attack mislabels, over the kept share."""
    figure, panels = new_figure(9.0, 3.8, columns=2)
    keep = np.linspace(0.02, 1, 150)
    eps = 0.3
    axes = panels[0]
    for end, strategy, label in (("high", "easy", "easy examples pruned"), ("low", "difficult", "difficult pruned")):
        look = mark(strategy)
        for angle, style, note in ((0.0, "-", "perfect probe"), (PROBE, "--", "probe at 20°")):
            share = mislabelled_share_after_pruning(eps, keep, end, angle)  # type: ignore[arg-type]
            axes.plot(keep, share, color=look.colour, ls=style, label=f"{label}, {note}")
    axes.axhline(float(mislabelled_share(eps)), color=mark("random").colour, label="random examples pruned")
    axes.axhline(0.5, color=MUTED, lw=0.8, ls=":")
    axes.text(0.99, 0.515, "half wrong: training collapses", color=MUTED, ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="kept share", ylabel="mislabelled share of kept data", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title("Pruning concentrates wrong labels (eps 0.3)")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.98))
    _percent(axes, x=True)
    axes = panels[1]
    radii = np.linspace(0, 0.8, 120)
    critical = collapse_fraction(radii)
    axes.fill_between(radii, 0, critical, color=RED, alpha=0.14, lw=0)
    axes.plot(radii, critical, color=RED, label="collapse law")
    axes.plot(
        radii, np.minimum(1, 2 * mislabelled_share(radii)), color=INK, ls=":", label="twice the mislabelled share"
    )
    axes.text(0.5, 0.3, "adversarial training on the\nkept examples collapses", color=RED, ha="center", fontsize=8.5)
    axes.set(xlabel="attack norm eps", ylabel="kept share (easy examples pruned)", xlim=(0, 0.8), ylim=(0, 1.02))
    axes.set_title("What must be kept without a cap")
    axes.legend(loc="upper left")
    _percent(axes)
    return figure


def draw_collapse(perfect: Table, theory: Table, learned: Table, alpha: float) -> Figure:
    """Left: collapse with a perfect probe, predicted and found. Right: with a learned one, and the cap's recovery."""
    figure, (left, right) = new_figure(9.0, 4.0, columns=2)
    for eps, colour in zip(perfect.values("eps"), (SKY, BLUE, INK), strict=False):
        predicted, found = (table.where(eps=eps, strategy="easy") for table in (theory, perfect))
        _line(left, predicted, "keep", "clean_error", "easy", colour=colour)
        _points(left, found, "keep", "clean_error", "easy", label=f"eps {eps:g}", colour=colour)
        left.axvline(float(collapse_fraction(eps)), color=colour, lw=0.8, ls="--")
    left.set(xlabel="kept share", ylabel="clean error", ylim=(0, 0.53))
    left.set_title("Easy examples pruned by a perfect probe")
    left.legend(loc="upper right", title="vertical: collapse law", title_fontsize=8)
    for strategy in ("easy", "random", "difficult", "puma", "puma-plus"):
        _points(right, learned.where(alpha=alpha, strategy=strategy), "keep", "clean_error", strategy, joined=True)
    none = float(learned.where(alpha=alpha, strategy="none")["clean_error"].mean())
    right.axhline(none, color=mark("none").colour, lw=1, label="none (all data)")
    right.set(xlabel="kept share", ylabel="clean error", ylim=(0, 0.53))
    right.set_title("Margins learned on the same data, eps 0.3")
    right.legend(loc="upper right")
    for axes in (left, right):
        _percent(axes, x=True)
    return figure


def draw_ends(isotropic: Table, anisotropic: Table, alphas: Sequence[float]) -> Figure:
    """Robust error against training on all data, over the kept share; a row per task, a column per data amount."""
    figure, panels = new_figure(9.0, 6.0, rows=2, columns=len(alphas), sharex=True)
    cells = [(task, alpha) for task in (isotropic, anisotropic) for alpha in alphas]
    for axes, (task, alpha) in zip(panels, cells, strict=True):
        part = exceed(task.where(alpha=alpha))
        for strategy in ("easy", "difficult", "random", "puma"):
            if task is isotropic or strategy != "puma":  # there puma trades robustness for accuracy: another figure
                _points(axes, part.where(strategy=strategy), "keep", "robust_excess", strategy, joined=True)
        axes.axhline(0, color=mark("none").colour, lw=1, label="none (all data)")
        axes.set(ylim=(-0.03, 0.125))
        axes.set_title(f"{'isotropic' if task is isotropic else 'anisotropic'}: {alpha:g} per dimension")
        _percent(axes, x=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}")
    for axes in panels[-len(alphas) :]:
        axes.set_xlabel("kept share")
    for axes in panels[:: len(alphas)]:
        axes.set_ylabel("robust error above none, points")
    panels[len(alphas) - 1].legend(loc="upper right")
    return figure


def exceed(table: Table) -> Table:
    """The table with ``clean_excess`` and ``robust_excess``: each error minus that of the same seed's ``none``."""
    whole = table.where(strategy="none")
    columns = dict(table.columns)
    for metric in _METRICS:
        none = dict(zip(whole["seed"].tolist(), whole[metric].tolist(), strict=True))
        base = np.array([none[seed] for seed in table["seed"].tolist()])
        columns[metric.replace("error", "excess")] = table[metric] - base
    return Table(columns)


@dataclass(frozen=True)
class GapPoint:
    """Gap of one strategy to the uniform-eps frontier: clean accuracy at equal robust accuracy, in [-1, 1].

    ``gaps`` holds one value per seed; NaN where the student lies outside the dial's range.
    """

    strategy: str
    keep: float
    clean: float
    robust: float
    gaps: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN unless every seed is comparable."""
        return float(self.gaps.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(self.gaps.std(ddof=1) / np.sqrt(len(self.gaps))) if len(self.gaps) > 1 else float("nan")


def measure_gaps(table: Table) -> list[GapPoint]:
    """The gap of every strategy and kept share of one data amount, paired by seed, to each seed's own frontier."""
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for seed in table.values("seed"):
        rows = [
            {**row, "robust": 1 - row["robust_error"], "clean": 1 - row["clean_error"]}
            for row in table.where(seed=seed)
        ]
        dial = [row for row in rows if row["strategy"] in FRONTIER or row["strategy"] == "uniform-eps"]
        frontier = Frontier("uniform-eps", [row["robust"] for row in dial], [row["clean"] for row in dial])
        for row in rows:
            if row not in dial:
                gap = row["clean"] - float(frontier.clean_at(row["robust"]))
                found.setdefault((row["strategy"], row["keep"]), []).append((row["clean"], row["robust"], gap))
    points = []
    for (strategy, keep), values in found.items():
        clean, robust, gaps = np.array(values).T
        points.append(GapPoint(strategy, keep, float(clean.mean()), float(robust.mean()), gaps))
    return points


def draw_tradeoff(table: Table, theory: Table) -> Figure:
    """Left: accuracies against each other, with the frontier. Right: each student's gap to it."""
    figure, (left, right) = new_figure(9.4, 4.8, columns=2)
    dial = table.columns["strategy"]
    names = [name for name in table.values("strategy") if name in FRONTIER or name == "uniform-eps"]
    means = [[1 - table[metric][dial == name].mean() for metric in _METRICS] for name in names]
    clean, robust = np.array(sorted(means)).T
    left.plot(robust, clean, "-o", color=INK, mfc="none", ms=5, label="all data, smaller uniform eps")
    order = np.argsort(theory["robust_error"])
    clean, robust = (1 - theory[metric][order] for metric in _METRICS)
    left.plot(robust, clean, color=GREEN, lw=1, ls="--", label="the same, theory")
    points = sorted(measure_gaps(table), key=lambda point: (point.strategy, -point.keep))
    for point in points:
        base = point.strategy.split("(")[0]
        first = base not in left.get_legend_handles_labels()[1]
        if point.clean > 0.55:  # a collapsed student would hide the rest
            size = 5 + 5 * (point.keep - 0.4)
            left.plot(point.robust, point.clean, **_look(base), ms=size, label=base if first else None)
    left.set(xlabel="robust accuracy", ylabel="clean accuracy")
    left.set_title("Trade-off (larger marker: more data kept)")
    left.legend(loc="lower left", fontsize=7.5)
    _percent(left, x=True)
    shown = [point for point in points if np.isfinite(point.mean)][::-1]
    for place, point in enumerate(shown):
        look = _look(point.strategy.split("(")[0])
        right.errorbar(100 * point.mean, place, xerr=200 * np.nan_to_num(point.error), **look, ms=5, lw=1)
    right.axvline(0, color=INK, lw=1)
    right.set_yticks(range(len(shown)), [f"{point.strategy}, {point.keep:.0%} kept" for point in shown], fontsize=7)
    right.set(xlabel="points of clean accuracy above the frontier\nat equal robust accuracy (bars: 2 standard errors)")
    right.set_title("Gap to the free control")
    return figure


def _look(strategy: str) -> dict[str, Any]:
    """Marker options of a strategy."""
    look = mark(strategy)
    return {"marker": look.marker, "color": look.colour, "mfc": look.face, "ls": ""}


def _line(axes: Axes, table: Table, over: str, metric: str, strategy: str, colour: str | None = None) -> None:
    """A theory curve: solid where it is reliable, dotted where not."""
    order = np.argsort(table[over])
    x, y, reliable = table[over][order], table[metric][order], table["reliable"][order]
    colour = colour or mark(strategy).colour
    axes.plot(x, y, color=colour, lw=1, ls=":")
    solid = np.where(reliable, y, np.nan)
    axes.plot(x, solid, color=colour, lw=1.3)


def _points(
    axes: Axes,
    table: Table,
    over: str,
    metric: str,
    strategy: str,
    *,
    label: str | None = None,
    colour: str | None = None,
    joined: bool = False,
) -> None:
    """Simulated means with bars of two standard errors."""
    mean, look = table.mean(metric, over), mark(strategy)
    axes.errorbar(
        mean.x,
        mean.mean,
        yerr=2 * np.nan_to_num(mean.error),
        color=colour or look.colour,
        marker=look.marker,
        mfc="none" if look.hollow else colour or look.colour,
        ms=4.5,
        lw=1,
        ls="-" if joined else "",
        label=label or strategy,
    )


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def _percent(axes: Axes, x: bool = False) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if x:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
