"""The figures that compare strategies: accuracies against each other, the prune fraction, the pool, the data used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from puma.report.placement import place_labels
from puma.report.style import INK, MUTED, mark, new_figure


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval; ``low`` and ``high`` are None where none can be given."""

    value: float
    low: float | None = None
    high: float | None = None

    def arms(self) -> tuple[float, float]:
        """Lengths of the error bar below and above; 0 where there is none."""
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        return max(self.value - low, 0.0), max(high - self.value, 0.0)


@dataclass(frozen=True)
class Point:
    """One arm in the plane of the trade-off."""

    label: str
    strategy: str
    robust: Interval
    clean: Interval


@dataclass(frozen=True)
class Frontier:
    """What a free dial reaches: its points in the order of the dial, robust and clean."""

    name: str
    robust: Sequence[float]
    clean: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """One strategy along an axis."""

    strategy: str
    label: str
    x: Sequence[float]
    y: Sequence[Interval]


def tradeoff_picture(points: Sequence[Point], frontiers: Sequence[Frontier], robust_name: str) -> Figure:
    """Robust accuracy to the right, clean accuracy upwards; call it inside `house_style`."""
    figure, (axes,) = new_figure(6.4, 4.9)
    for line in frontiers:
        axes.plot(
            line.robust,
            line.clean,
            mark(line.name).line,
            color=mark(line.name).colour,
            label=line.name,
            zorder=2,
        )
    for point in points:
        _draw(axes, point.robust, point.clean, point.strategy, bars_in_x=True)
    axes.set_xlabel(f"{robust_name} →")
    axes.set_ylabel("clean accuracy →")
    _shares(axes.xaxis)
    _shares(axes.yaxis)
    _frame(axes.set_xlim, [point.robust.value for point in points])
    _frame(axes.set_ylim, [point.clean.value for point in points])
    if frontiers:
        axes.legend(title="control frontiers", loc="best", title_fontsize=8)
    places = np.array([[point.robust.value, point.clean.value] for point in points], dtype=np.float64).reshape(-1, 2)
    colours = [_text_colour(point.strategy) for point in points]
    lines = [np.column_stack([line.robust, line.clean]).astype(np.float64) for line in frontiers]
    place_labels(axes, places, [point.label for point in points], colours, lines)
    return figure


def accuracy_curves(
    robust: Sequence[Curve], clean: Sequence[Curve], robust_name: str, xlabel: str, log: bool = False
) -> Figure:
    """Robust and clean accuracy along one axis, a line per strategy; call it inside `house_style`."""
    figure, panels = new_figure(6.4, 6.2, rows=2, sharex=True)
    for axes, curves, name in zip(panels, (robust, clean), (robust_name, "clean accuracy"), strict=True):
        for curve in curves:
            look = mark(curve.strategy)
            values = [interval.value for interval in curve.y]
            axes.plot(curve.x, values, color=look.colour, linestyle=look.line, zorder=2)
            for x, interval in zip(curve.x, curve.y, strict=True):
                _draw(axes, Interval(x), interval, curve.strategy)
            axes.plot([], [], look.marker, color=look.colour, markerfacecolor=look.face, label=curve.label)
        axes.set_title(name)
        _shares(axes.yaxis)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    panels[-1].set_xlabel(xlabel)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def share_dots(rows: Sequence[tuple[str, str, Interval]], xlabel: str) -> Figure:
    """One line per strategy with its share and interval; rows of (strategy, label, share). Inside `house_style`."""
    figure, (axes,) = new_figure(6.4, 0.9 + 0.26 * max(len(rows), 1))
    for place, (strategy, _, share) in enumerate(rows):
        _draw(axes, share, Interval(place), strategy, bars_in_x=True)
    axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)
    _shares(axes.xaxis)
    return figure


def matrix(values: np.ndarray, names: Sequence[str], columns: Sequence[str], colour: str, digits: int = 2) -> Figure:
    """A matrix of shares in [0, 1] as tinted cells with their numbers; NaN stays empty. Inside `house_style`.

    Cells are tinted by opacity, so that they follow the page into dark mode.
    """
    rows, cols = values.shape
    figure, (axes,) = new_figure(min(6.4, 2.0 + 0.62 * cols), 1.2 + 0.34 * rows)
    for i in range(rows):
        for j in range(cols):
            value = float(values[i, j])
            if np.isfinite(value):
                box = (j - 0.5, i - 0.5)
                axes.add_patch(_cell(box, colour, 0.6 * float(np.clip(value, 0, 1))))
                text = f"{value:.{digits}f}" if value < 1 or digits > 1 else "1"
                axes.text(j, i, text, ha="center", va="center", fontsize=7)
    axes.set_xlim(-0.5, cols - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(cols), list(columns), rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(rows), list(names))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def _cell(corner: tuple[float, float], colour: str, opacity: float):  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor=colour, alpha=opacity, edgecolor="none")


def _draw(axes: Axes, x: Interval, y: Interval, strategy: str, bars_in_x: bool = False) -> None:
    look = mark(strategy)
    axes.errorbar(
        x.value,
        y.value,
        xerr=[[x.arms()[0]], [x.arms()[1]]] if bars_in_x else None,
        yerr=[[y.arms()[0]], [y.arms()[1]]],
        fmt="none",
        ecolor=look.colour,
        elinewidth=0.8,
        alpha=0.35,
        zorder=3,
    )
    axes.plot(
        x.value,
        y.value,
        look.marker,
        color=look.colour,
        markerfacecolor=look.face,
        markersize=6,
        linestyle="none",
        zorder=4,
    )


def _frame(set_limits: Callable[..., object], values: Sequence[float]) -> None:
    """Limits around the points themselves: long intervals are cut rather than squeeze the points together."""
    if values:
        room = max(0.22 * (max(values) - min(values)), 0.012)
        set_limits(min(values) - room, max(values) + room)


def _text_colour(strategy: str) -> str:
    colour = mark(strategy).colour
    return INK if colour == MUTED else colour


def _shares(axis) -> None:  # type: ignore[no-untyped-def]
    axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
