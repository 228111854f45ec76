"""Matplotlib style shared by every figure of PUMA: colours, one marker per strategy, SVG output.

Figures are made with `new_figure` inside `figure_style`, never through pyplot: no global state, safe in threads and
servers. Their ground is white, so that they read in any theme.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cycler import cycler
from matplotlib import rc_context, rcParams, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2328", "#6a727c", "#dfe3e8", "#ffffff"
# Okabe and Ito's palette, darkened where the original is too pale for a thin line on white.
BLUE, SKY, GREEN, ORANGE = "#0072b2", "#3a9bd9", "#00845f", "#c27c00"
RED, PURPLE, GREY, BROWN = "#d55e00", "#b0578d", "#737b85", "#7a5230"

CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BROWN, GREY)
"""Colours for series that are not strategies, in the order to use them."""


@dataclass(frozen=True)
class Mark:
    """Look of one strategy in every figure: colour, marker, hollow marker (a control), kind of line."""

    colour: str
    marker: str
    hollow: bool = False
    line: str = "-"

    @property
    def face(self) -> str:
        """Fill of the marker."""
        return PAPER if self.hollow else self.colour


MARKS = {
    "none": Mark(INK, "o"),
    "puma": Mark(RED, "D"),
    "puma-plus": Mark(PURPLE, "P"),
    "soft-easy": Mark(GREEN, "^"),
    "easy": Mark(BLUE, "s"),
    "difficult": Mark(SKY, "v", line="--"),
    "random": Mark(GREY, "X", line=":"),
    "ccs": Mark(GREEN, "p", line="--"),
    "el2n-adv": Mark(ORANGE, ">", line="--"),
    "robust-failure": Mark(ORANGE, "<", line=":"),
    "dynamic-uncertainty": Mark(ORANGE, "h", line="-."),
    "input-gradient": Mark(BROWN, "d"),
    "dedup": Mark(BROWN, "*", line="--"),
    "uniform-eps": Mark(INK, "o", hollow=True, line="--"),
    "trades-beta": Mark(MUTED, "s", hollow=True, line=":"),
    "cap-only": Mark(RED, "^", hollow=True, line="--"),
    "random-cap": Mark(RED, "v", hollow=True, line=":"),
    "puma-shuffled": Mark(RED, "D", hollow=True, line="-."),
    "easy-matched": Mark(BLUE, "s", hollow=True, line="--"),
}


def mark(strategy: str) -> Mark:
    """Fixed look of a strategy; an unknown strategy gets one derived from its name, the same every time."""
    if strategy in MARKS:
        return MARKS[strategy]
    code = zlib.crc32(strategy.encode())
    return Mark(CYCLE[code % len(CYCLE)], "osD^v<>pPXh*"[code // 8 % 12])


_UNTOUCHED = {"backend", "backend_fallback", "interactive"}
_RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "puma",
    "pdf.fonttype": 42,
    "pdf.use14corefonts": False,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Use PUMA's matplotlib settings for everything drawn or saved inside, whatever the user's own are."""
    with rc_context():
        defaults: Any = {name: rcParamsDefault[name] for name in rcParamsDefault if name not in _UNTOUCHED}
        rcParams.update(defaults)
        rcParams.update(_RC)
        yield


def new_figure(
    width: float = 5.0, height: float = 3.4, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``width`` x ``height`` inches and its axes in reading order; call it inside `figure_style`.

    Five inches keep 8-point text readable when the page is 400 pixels wide.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(grid.ravel())


def svg_text(figure: Figure) -> str:
    """Text of a figure as a complete SVG file on white; equal figures give equal bytes."""
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    lines = (
        line.rstrip().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
        for line in buffer.getvalue().splitlines()
    )
    return "\n".join(lines) + "\n"
