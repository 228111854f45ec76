"""Figures of the pages of studies and runs, each from plain values; call them inside `puma.plots.figure_style`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from puma.margins import STATUS_NAMES, MarginTable
from puma.plots import BLUE, INK, MUTED, RED, mark, new_figure, plot_margins
from puma.threat import ThreatModel
from puma.tradeoff import Estimate, Frontier

Curve = tuple[str, Sequence[float], Sequence[Estimate]]
"""One strategy along an axis: its name, places, accuracies."""


@dataclass(frozen=True)
class Point:
    """One setting in the plane of the trade-off; ``label`` is empty where the legend alone names it."""

    strategy: str
    label: str
    robust: Estimate
    clean: Estimate


def plot_tradeoff(axes: Axes, points: Sequence[Point], controls: Sequence[Frontier], robust_name: str) -> None:
    """Plot robust accuracy to the right, clean accuracy upwards, in percent; lines are the free controls."""
    for control in controls:
        robust, clean = (axis.tolist() for axis in control.corners)
        # level beyond the undominated points, as far as the control was run
        x = [float(control.robust.min()), *robust, robust[-1]]
        y = [clean[0], *clean, float(control.clean.min())]
        look = mark(control.name)
        axes.plot(100 * np.array(x), 100 * np.array(y), look.line, color=look.colour, zorder=2)
    for point in points:
        _draw(axes, point.strategy, point.robust, point.clean)
    axes.set(xlabel=f"{robust_name}, % →", ylabel="clean accuracy, % →")
    for axis, set_limits, values in (
        (axes.xaxis, axes.set_xlim, [p.robust.value for p in points]),
        (axes.yaxis, axes.set_ylim, [p.clean.value for p in points]),
    ):
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        if values:  # around the points themselves: long intervals are cut rather than squeeze the points together
            room = max(0.12 * (max(values) - min(values)), 0.005)
            set_limits(100 * (min(values) - room), 100 * (max(values) + room))


def tradeoff_figure(points: Sequence[Point], controls: Sequence[Frontier], robust_name: str) -> Figure:
    """The trade-off with a legend of all strategies below and labels beside the main points."""
    figure, (axes,) = new_figure(5.0, 4.5)
    lines = [control.name for control in controls]
    _legend(axes, list(dict.fromkeys(point.strategy for point in points)), lines, 4, fontsize=7.5, columnspacing=1.0)
    plot_tradeoff(axes, points, controls, robust_name)
    places = np.array([[100 * p.robust.value, 100 * p.clean.value] for p in points]).reshape(-1, 2)
    colours = [INK if mark(p.strategy).colour == MUTED else mark(p.strategy).colour for p in points]
    _place_labels(axes, places, [p.label for p in points], colours)
    return figure


def curves_figure(panels: Mapping[str, Sequence[Curve]], xlabel: str, log: bool = False) -> Figure:
    """One panel per accuracy over a shared axis, one line per strategy, in percent."""
    figure, axes_list = new_figure(5.0, 0.9 + 2.3 * len(panels), rows=len(panels), sharex=True)
    for axes, (title, curves) in zip(axes_list, panels.items(), strict=True):
        for strategy, places, accuracies in curves:
            look = mark(strategy)
            axes.plot(places, [100 * y.value for y in accuracies], look.line, color=look.colour, zorder=2)
            for x, y in zip(places, accuracies, strict=True):
                _draw(axes, strategy, x, y)
        axes.set_title(f"{title}, %")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    axes_list[-1].set_xlabel(xlabel)
    names = list(dict.fromkeys(strategy for curves in panels.values() for strategy, _, _ in curves))
    _legend(axes_list[0], names, names, 3)
    return figure


def margin_figure(table: MarginTable, threat: ThreatModel | None = None) -> Figure:
    """Histogram of the margins of each kind of image, stacked by status."""
    kinds = image_kinds(table)
    figure, panels = new_figure(5.0, 0.9 + 1.7 * len(kinds), rows=len(kinds), sharex=True)
    eps = threat.eps if threat is not None and threat.norm == table.norm else None
    for axes, (kind, rows) in zip(panels, kinds.items(), strict=True):
        by_status = {name: table.margin[rows & (table.status == code)] for code, name in enumerate(STATUS_NAMES)}
        plot_margins(by_status, table.norm, eps, axes)
        axes.set_title(f"{kind}: {int(rows.sum()):,} images")
        axes.label_outer()
    return figure


def image_kinds(table: MarginTable) -> dict[str, NDArray[np.bool_]]:
    """Rows of the real and of the synthetic images, or of all where there is one kind only."""
    if not table.synthetic.any() or table.synthetic.all():
        return {"synthetic" if len(table) and table.synthetic.all() else "real": np.ones(len(table), dtype=bool)}
    return {"real": ~table.synthetic, "synthetic": table.synthetic}


def training_figure(panels: Mapping[str, Mapping[str, tuple[Any, Any]]], best: int | None) -> Figure:
    """One panel per quantity, at most two lines each: label -> (steps, values); a dotted line is the best step."""
    figure, axes_list = new_figure(5.0, 0.9 + 1.5 * len(panels), rows=len(panels), sharex=True)
    for axes, (title, lines) in zip(axes_list, panels.items(), strict=True):
        for colour, (label, (steps, values)) in zip((BLUE, RED), lines.items(), strict=False):
            axes.plot(steps, values, color=colour, label=label)
        if best is not None:
            axes.axvline(best, color=MUTED, linewidth=0.9, linestyle=":")
        axes.set_title(title)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if len(lines) > 1:
            axes.legend(loc="best")
    axes_list[-1].set_xlabel("step")
    return figure


def _draw(axes: Axes, strategy: str, x: Estimate | float, y: Estimate) -> None:
    """A marker with error bars where a coordinate is an estimate; estimates are drawn in percent."""
    look, at, bars = mark(strategy), list[float](), list[list[list[float]]]()
    for value in (x, y):
        known = value if isinstance(value, Estimate) else Estimate(value / 100, None, None, 1)
        low, high = (known.value if end is None else end for end in (known.low, known.high))
        at.append(100 * known.value)
        bars.append([[100 * max(known.value - low, 0.0)], [100 * max(high - known.value, 0.0)]])
    axes.errorbar(at[0], at[1], bars[1], bars[0], "none", ecolor=look.colour, elinewidth=0.8, alpha=0.35, zorder=3)
    axes.plot(at[0], at[1], ls="none", markersize=5.5, zorder=4, **look.dot)


def _legend(axes: Axes, strategies: Sequence[str], lines: Sequence[str], columns: int, **options: Any) -> None:
    """A legend below the figure; strategies in ``lines`` are shown with their line."""
    handles = []
    for strategy in strategies:
        look = mark(strategy)
        handles += axes.plot([], [], ls=look.line if strategy in lines else "none", markersize=5.5, **look.dot)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "handletextpad": 0.4}
    axes.get_figure().legend(handles, strategies, **place, **options)  # type: ignore[union-attr]  # has a figure


def _place_labels(
    axes: Axes, points: NDArray[np.float64], labels: Sequence[str], colours: Sequence[str], size: float = 7.5
) -> None:
    """Write labels beside points ``[N, 2]`` (data coordinates), each where it covers least of the others; "" is none.

    Greedy and deterministic. Call it when everything else is drawn: the figure's layout is fixed here.
    """
    figure = axes.figure
    canvas = FigureCanvasAgg(figure)  # type: ignore[arg-type]  # no subfigure here
    canvas.draw()  # type: ignore[no-untyped-call]  # of matplotlib
    figure.set_layout_engine("none")  # type: ignore[union-attr]  # has a figure
    scale, frame = figure.dpi / 72, np.array([axes.get_window_extent().extents])
    places = axes.transData.transform(points) if len(points) else np.empty((0, 2))
    taken = np.hstack([places - 4 * scale, places + 4 * scale])  # boxes: left, bottom, right, top
    radii, angles = (
        grid.ravel() for grid in np.meshgrid((7, 12, 18, 26, 36, 48), np.radians(np.arange(0, 360, 30)), indexing="ij")
    )
    ways = np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def overlap(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
        sides = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
        return np.asarray(np.prod(np.maximum(sides, 0), axis=2).sum(axis=1))

    for place, label, colour in zip(places, labels, colours, strict=True):
        if not label:
            continue
        text = axes.text(0, 0, label, fontsize=size, color=colour, ha="center", va="center", zorder=6)
        text.set_in_layout(False)
        extent = text.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]  # of matplotlib
        half = np.array([extent.width + 2, extent.height + 1]) / 2
        middles = place + ways * (scale * radii[:, None] + half)
        boxes = np.hstack([middles - half, middles + half])
        costs = 1000 * (4 * half.prod() - overlap(boxes, frame) + overlap(boxes, taken)) + radii
        best = int(np.argmin(costs))
        taken = np.vstack([taken, boxes[best]])
        text.set_position(tuple(axes.transData.inverted().transform(middles[best])))
        if costs[best] >= 18:  # further off: a thin line leads to it
            ends = axes.transData.inverted().transform([place, middles[best]])
            axes.plot(*ends.T, color=MUTED, linewidth=0.6, zorder=1)
