"""Figures of what lies in a margin table and in plans: margins by status and class, attack norms by strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from puma.margins import STATUS_NAMES, MarginTable
from puma.report.style import BLUE, GREEN, INK, MUTED, ORANGE, RED, mark, new_figure
from puma.threat import Norm, ThreatModel

STATUS_COLOURS = {"crossed": BLUE, "misclassified": RED, "estimated": GREEN}
_BINS = 60


@dataclass(frozen=True)
class Group:
    """Some rows of the pool under one name, such as "real" or "synthetic"."""

    name: str
    rows: NDArray[np.bool_]


def groups(table: MarginTable) -> list[Group]:
    """Real and synthetic rows, or all where there is one kind only."""
    if not table.synthetic.any() or table.synthetic.all():
        return [Group("synthetic" if len(table) and table.synthetic.all() else "real", np.ones(len(table), dtype=bool))]
    return [Group("real", ~table.synthetic), Group("synthetic", table.synthetic)]


def unit(norm: Norm) -> tuple[float, str]:
    """The factor and the words in which figures show margins and eps: 1/255 in Linf, plain pixel units in L2."""
    return (255.0, f"{norm}, in 1/255") if norm == "Linf" else (1.0, norm)


def margin_histogram(table: MarginTable, threat: ThreatModel | None = None) -> Figure:
    """Margins of each kind of image, stacked by status; the dashed lines are 0 and eps. Inside `house_style`."""
    kinds = groups(table)
    figure, panels = new_figure(6.4, 1.1 + 1.7 * len(kinds), rows=len(kinds), sharex=True)
    factor, words = unit(table.norm)
    finite = np.isfinite(table.margin)
    values = table.margin[finite] * factor
    edges = np.linspace(*_limits(values), _BINS + 1)
    statuses = [name for name in STATUS_COLOURS if (table.status == STATUS_NAMES.index(name)).any()]
    for axes, group in zip(panels, kinds, strict=True):
        base = np.zeros(_BINS)
        total = max(int(group.rows.sum()), 1)
        for name in statuses:
            rows = group.rows & finite & (table.status == STATUS_NAMES.index(name))
            share = np.histogram(np.clip(table.margin[rows] * factor, edges[0], edges[-1]), edges)[0] / total
            axes.stairs(base + share, edges, baseline=base, fill=True, color=STATUS_COLOURS[name], label=name)
            base = base + share
        axes.axvline(0, color=INK, linewidth=0.9, linestyle="--")
        if threat is not None and threat.norm == table.norm:
            axes.axvline(threat.eps * factor, color=MUTED, linewidth=0.9, linestyle="--")
            axes.annotate("eps", (threat.eps * factor, 1), (3, -2), xycoords=("data", "axes fraction"),
                          textcoords="offset points", va="top", fontsize=7.5, color=MUTED)  # fmt: skip
        axes.set_title(f"{group.name}: {int(group.rows.sum()):,} images")
        axes.set_ylabel("share of images")
        axes.set_ylim(bottom=0)
    panels[0].legend(loc="upper right")
    panels[-1].set_xlabel(f"margin ({words}); higher is easier")
    return figure


def margins_by_class(table: MarginTable, names: Sequence[str]) -> Figure:
    """Per class the middle half (thick), the range of 5 to 95 % (thin) and the median. Inside `house_style`."""
    factor, words = unit(table.norm)
    figure, (axes,) = new_figure(6.4, 1.1 + 0.3 * len(names))
    kinds = groups(table)
    for offset, (group, colour) in enumerate(zip(kinds, (BLUE, ORANGE), strict=False)):
        shift = (offset - (len(kinds) - 1) / 2) * 0.34
        for code in range(len(names)):
            margins = table.margin[group.rows & (table.label == code) & np.isfinite(table.margin)] * factor
            if not len(margins):
                continue
            low, quarter, middle, three, high = np.quantile(margins, [0.05, 0.25, 0.5, 0.75, 0.95])
            axes.plot([low, high], [code + shift] * 2, color=colour, linewidth=1)
            axes.plot([quarter, three], [code + shift] * 2, color=colour, linewidth=4, solid_capstyle="butt")
            axes.plot(middle, code + shift, "o", color=INK, markersize=3)
        axes.plot([], [], color=colour, linewidth=4, label=group.name)
    axes.axvline(0, color=INK, linewidth=0.9, linestyle="--")
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"margin ({words}); higher is easier")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def eps_histograms(epsilons: Mapping[str, tuple[str, NDArray[np.float32]]], norm: Norm) -> Figure:
    """A small histogram per strategy of the eps of its kept images. Inside `house_style`.

    Args:
        epsilons: label -> (strategy, float32 ``[kept]``).
        norm: the norm of the eps.
    """
    columns = 2
    rows = -(-len(epsilons) // columns)
    figure, panels = new_figure(6.4, 0.7 + 1.25 * rows, rows=rows, columns=columns, sharex=True, sharey=True)
    factor, words = unit(norm)
    top = max((float(values.max()) for _, values in epsilons.values() if len(values)), default=1.0) * factor
    edges = np.linspace(0, top * 1.0001 or 1.0, 41)
    for axes, (label, (strategy, values)) in zip(panels, epsilons.items(), strict=False):
        share = np.histogram(values * factor, edges)[0] / max(len(values), 1)
        axes.stairs(share, edges, fill=True, color=mark(strategy).colour, alpha=0.85)
        axes.set_title(label, fontsize=8.5)
        if len(values):
            axes.axvline(float(values.mean()) * factor, color=INK, linewidth=0.9, linestyle="--")
    for axes in panels[len(epsilons) :]:
        axes.set_visible(False)
    figure.supxlabel(f"eps of kept images ({words}); dashed: mean", fontsize=9)
    figure.supylabel("share of kept images", fontsize=9)
    return figure


def training_curves(
    runs: Mapping[str, Mapping[str, NDArray[np.float64]]], best: Mapping[str, float], step: str
) -> Figure:
    """One panel per quantity, one line per run, over ``step``; a dot marks the best checkpoint. Inside `house_style`.

    Args:
        runs: label -> columns by name; a quantity that a run lacks is left out for it.
        best: label -> the step of its best checkpoint; may be empty.
        step: the column along the axis.
    """
    quantities = list(dict.fromkeys(name for columns in runs.values() for name in columns if name != step))
    figure, panels = new_figure(6.4, 0.8 + 1.9 * len(quantities), rows=max(len(quantities), 1), sharex=True)
    for axes, quantity in zip(panels, quantities, strict=False):
        for place, (label, columns) in enumerate(runs.items()):
            if quantity not in columns:
                continue
            known = np.isfinite(columns[quantity])
            steps, values = columns[step][known], columns[quantity][known]
            look = mark(label.split()[0])
            colour, kind = (look.colour, look.line) if len(runs) > 1 else (BLUE, "-")
            axes.plot(steps, values, color=colour, linestyle=kind, label=label)
            if label in best and len(steps):
                axes.plot(best[label], np.interp(best[label], steps, values), "o", color=colour, zorder=4 + place)
        axes.set_title(quantity)
    panels[-1].set_xlabel(step)
    if len(runs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _limits(values: NDArray[np.floating]) -> tuple[float, float]:
    """Range of a histogram: all but the outermost thousandth on either side, which is counted in the end bins."""
    if not len(values):
        return -1.0, 1.0
    low, high = np.quantile(values, [0.001, 0.999])
    room = (float(high) - float(low)) * 0.02 or 1.0
    return min(float(low) - room, 0.0), float(high) + room
