"""The perceptron task in two dimensions: teacher, probe, and the bands that decide, as a picture for newcomers."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from puma.report.style import BLUE, GREY, INK, MUTED, ORANGE, PAPER, RED, new_figure

_EDGE = 2.6
_EPS, _CAP, _KEEP_WITHIN = 0.45, 0.5, 1.35
_ANGLE = math.radians(18)


def draw_geometry(points: int = 150, seed: int = 4) -> Figure:
    """Two panels: what the attack does to labels, and what PUMA does about it. Call it inside `house_style`.

    The teacher's boundary is the vertical line, examples right of it are labelled +. ``eps`` is larger than in the
    experiments, so that its band can be seen.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((points, 2))
    x = x[np.abs(x).max(axis=1) < _EDGE - 0.1]
    figure, (left, right) = new_figure(9.0, 4.9, columns=2)
    _draw_attack(left, x)
    _draw_rule(right, x)
    for axes in (left, right):
        axes.set(xlim=(-_EDGE, _EDGE), ylim=(-_EDGE, _EDGE), xticks=[], yticks=[], aspect="equal")
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _draw_attack(axes: Axes, x: NDArray[np.float64]) -> None:
    """The teacher, the examples, and those that an attack of norm eps carries over the boundary."""
    axes.axvspan(-_EPS, _EPS, color=RED, alpha=0.16, lw=0)
    axes.axvline(0, color=INK, lw=2)
    near = np.abs(x[:, 0]) < _EPS
    _scatter(axes, x, np.where(near, RED, GREY))
    for start in x[near][:14]:
        axes.annotate(
            "",
            (start[0] - np.sign(start[0]) * _EPS, start[1]),
            start,
            arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 1, "shrinkA": 3, "shrinkB": 0},
        )
    axes.set_title("1  Full-strength attack: labels become wrong")
    _say(axes, 0, 2.42, "teacher's boundary", INK)
    _say(axes, 0, -2.42, "mislabelled band: closer than eps", RED)
    _say(axes, -1.75, 2.0, "label −", MUTED)
    _say(axes, 1.75, 2.0, "label +", MUTED)
    _say(
        axes,
        1.62,
        -1.75,
        "the attack moves these\nred points across, and the\nlabel stays: training\nlearns it wrong",
        RED,
    )


def _draw_rule(axes: Axes, x: NDArray[np.float64]) -> None:
    """The probe's bands: far ones are pruned, near ones attacked less, misclassified ones not at all."""
    normal = np.array([math.cos(_ANGLE), math.sin(_ANGLE)])
    along = np.array([-normal[1], normal[0]])
    reach = 2 * _EDGE
    for side in (-1, 1):
        _band(axes, normal, side * _KEEP_WITHIN, side * reach, BLUE, 0.13)
    _band(axes, normal, -_EPS / _CAP, _EPS / _CAP, ORANGE, 0.2)
    axes.axvline(0, color=INK, lw=2)
    ends = np.stack([-reach * along, reach * along])
    axes.plot(ends[:, 0], ends[:, 1], color=ORANGE, lw=2, ls="--")
    margin = np.sign(x[:, 0]) * (x @ normal)
    pruned = margin > _KEEP_WITHIN
    near = ~pruned & (margin < _EPS / _CAP)
    wrong = margin < 0
    axes.scatter(x[pruned, 0], x[pruned, 1], s=16, marker="x", color=BLUE, lw=1, zorder=3)
    for rows, colour in ((~pruned & ~near, GREY), (near & ~wrong, ORANGE), (wrong, RED)):
        _scatter(axes, x[rows], colour)
    for start, m in zip(x[~pruned & ~wrong], margin[~pruned & ~wrong], strict=True):
        step = min(_EPS, _CAP * m)
        end = start - np.sign(start[0]) * normal * step
        axes.plot(*np.stack([start, end]).T, color=ORANGE if m < _EPS / _CAP else GREY, lw=1, zorder=2)
    axes.set_title("2  PUMA: prune the far, attack the near more gently")
    _say(axes, 0.05, -2.42, "teacher", INK)
    _say(axes, -0.86, 2.42, "probe (margin model)", ORANGE)
    _say(axes, 1.85, 1.55, "pruned band:\neasy examples", BLUE)
    _say(axes, -1.85, -1.55, "pruned band:\neasy examples", BLUE)
    _say(
        axes,
        1.42,
        -2.0,
        "capped band: attacked by\nat most half the margin;\nthe probe's mistakes (red)\nnot at all",
        ORANGE,
    )


def _scatter(axes: Axes, x: NDArray[np.float64], colour: str | NDArray[np.str_]) -> None:
    """Examples: filled right of the teacher (label +), hollow left of it."""
    colours = np.broadcast_to(np.asarray(colour), len(x))
    for right, filled in ((True, True), (False, False)):
        rows = (x[:, 0] > 0) == right
        edge = colours[rows].tolist()
        axes.scatter(x[rows, 0], x[rows, 1], s=17, color=edge if filled else PAPER, edgecolors=edge, lw=1, zorder=3)


def _band(axes: Axes, normal: NDArray[np.float64], low: float, high: float, colour: str, alpha: float) -> None:
    """The strip ``low < normal.x < high``."""
    along, reach = np.array([-normal[1], normal[0]]), 3 * _EDGE
    corners = [low * normal - reach * along, high * normal - reach * along, high * normal + reach * along]
    corners.append(low * normal + reach * along)
    axes.fill(*np.array(corners).T, color=colour, alpha=alpha, lw=0)


def _say(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    axes.text(x, y, text, color=colour, ha="center", va="center", fontsize=8.5, bbox=box, zorder=5)
