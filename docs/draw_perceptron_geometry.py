"""The figure images/perceptron-geometry.svg of docs/perceptron.md: the linear task in two dimensions.

python docs/draw_perceptron_geometry.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from puma.plots import BLUE, GREY, INK, MUTED, ORANGE, PAPER, RED, figure_style, new_figure, svg_text

_EDGE = 2.6
_EPS, _CAP, _KEEP_WITHIN, _ANGLE = 0.45, 0.5, 1.35, math.radians(18)


def geometry_figure(points: int = 150, seed: int = 4) -> Figure:
    """The task in two dimensions: what the attack does to labels, and what PUMA does about it.

    The teacher's boundary is the vertical line, examples right of it are labelled +. ``eps`` is larger than in the
    experiments, so that its band can be seen.
    """
    x = np.random.default_rng(seed).standard_normal((points, 2))
    x = x[np.abs(x).max(axis=1) < _EDGE - 0.1]
    figure, (left, right) = new_figure(9.0, 4.9, columns=2)
    for axes in (left, right):
        axes.axvline(0, color=INK, lw=2)
        axes.set(xlim=(-_EDGE, _EDGE), ylim=(-_EDGE, _EDGE), xticks=[], yticks=[], aspect="equal")
        axes.grid(False)
        axes.spines[:].set_visible(False)
    left.axvspan(-_EPS, _EPS, color=RED, alpha=0.16, lw=0)
    near = np.abs(x[:, 0]) < _EPS
    _scatter(left, x, np.where(near, RED, GREY))
    for start in x[near][:14]:
        end = (start[0] - np.sign(start[0]) * _EPS, start[1])
        left.annotate(
            "", end, start, arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 1, "shrinkA": 3, "shrinkB": 0}
        )
    left.set_title("1  Attack at full eps: labels become wrong")
    note = "the attack moves these\nred points across, and the\nlabel stays: training\nlearns it wrong"
    for at, text, colour in (
        ((0, 2.42), "teacher's boundary", INK),
        ((0, -2.42), "mislabelled band: closer than eps", RED),
        ((-1.75, 2.0), "label −", MUTED),
        ((1.75, 2.0), "label +", MUTED),
        ((1.62, -1.75), note, RED),
    ):
        _text(left, at, text, colour)
    _plot_rule(right, x)
    return figure


def _plot_rule(axes: Axes, x: NDArray[np.float64]) -> None:
    """The probe's bands: far examples are pruned, near ones attacked less, misclassified ones not at all."""
    normal = np.array([math.cos(_ANGLE), math.sin(_ANGLE)])
    along = 3 * _EDGE * np.array([-normal[1], normal[0]])
    bands = [(side * _KEEP_WITHIN, side * 2 * _EDGE, BLUE, 0.13) for side in (-1, 1)]
    for low, high, colour, alpha in (*bands, (-_EPS / _CAP, _EPS / _CAP, ORANGE, 0.2)):
        corners = [low * normal - along, high * normal - along, high * normal + along, low * normal + along]
        axes.fill(*np.array(corners).T, color=colour, alpha=alpha, lw=0)
    axes.plot(*np.stack([-along, along]).T, color=ORANGE, lw=2, ls="--")
    margin = np.sign(x[:, 0]) * (x @ normal)
    pruned, wrong = margin > _KEEP_WITHIN, margin < 0
    near = ~pruned & (margin < _EPS / _CAP)
    axes.scatter(x[pruned, 0], x[pruned, 1], s=16, marker="x", color=BLUE, lw=1, zorder=3)
    for rows, colour in ((~pruned & ~near, GREY), (near & ~wrong, ORANGE), (wrong, RED)):
        _scatter(axes, x[rows], np.full(rows.sum(), colour))
    for start, m in zip(x[~pruned & ~wrong], margin[~pruned & ~wrong], strict=True):
        end = start - np.sign(start[0]) * normal * min(_EPS, _CAP * m)
        axes.plot(*np.stack([start, end]).T, color=ORANGE if m < _EPS / _CAP else GREY, lw=1, zorder=2)
    axes.set_title("2  PUMA: prune the far, attack the near more gently")
    capped = "capped band: attacked by\nat most half the margin;\nthe probe's mistakes (red)\nnot at all"
    for at, text, colour in (
        ((0.05, -2.42), "teacher", INK),
        ((-0.86, 2.42), "probe (margin model)", ORANGE),
        ((1.85, 1.55), "pruned band:\neasy examples", BLUE),
        ((-1.85, -1.55), "pruned band:\neasy examples", BLUE),
        ((1.42, -2.0), capped, ORANGE),
    ):
        _text(axes, at, text, colour)


def _scatter(axes: Axes, x: NDArray[np.float64], colours: NDArray[np.str_]) -> None:
    """Examples: filled right of the teacher (label +), hollow left of it."""
    for filled in (True, False):
        rows = (x[:, 0] > 0) == filled
        edge = colours[rows].tolist()
        axes.scatter(x[rows, 0], x[rows, 1], s=17, color=edge if filled else PAPER, edgecolors=edge, lw=1, zorder=3)


def _text(axes: Axes, at: tuple[float, float], text: str, colour: str) -> None:
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(*at, text, color=colour, ha="center", va="center", fontsize=8.5, bbox=box, zorder=5)


if __name__ == "__main__":
    with figure_style():
        picture = geometry_figure()
    (Path(__file__).parent / "images" / "perceptron-geometry.svg").write_text(svg_text(picture))
