"""The house style of every figure: colours that survive colour blindness, one colour and marker per strategy.

Figures are made with `new_figure`, never through pyplot: no global state, safe in threads and servers. A colour of
`DARK` is swapped for its lighter twin where the page is read in dark mode (see `puma.report.svg`).
"""

from __future__ import annotations

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

DARK = {
    INK: "#e8eaed", MUTED: "#9aa3ad", GRID: "#363c44", PAPER: "#15181c", BLUE: "#4db0ee", SKY: "#8ccbf5",
    GREEN: "#2fc79a", ORANGE: "#eeb03f", RED: "#ff8b45", PURPLE: "#e28fc2", GREY: "#a4acb6", BROWN: "#c79a72",
}  # fmt: skip
"""Each colour of the house and what it becomes on a dark page."""

CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BROWN, GREY)
"""Colours for series that are no strategies, in the order to use them."""


@dataclass(frozen=True)
class Mark:
    """How one strategy is drawn, everywhere: colour, marker, whether the marker is hollow (a control), kind of line."""

    colour: str
    marker: str
    hollow: bool = False
    line: str = "-"

    @property
    def face(self) -> str:
        """Fill of the marker."""
        return "none" if self.hollow else self.colour


MARKS = {
    "none": Mark(INK, "o"),
    "puma": Mark(RED, "D"),
    "puma-plus": Mark(PURPLE, "P"),
    "tilt": Mark(GREEN, "^"),
    "easy": Mark(BLUE, "s"),
    "difficult": Mark(SKY, "v"),
    "random": Mark(GREY, "X"),
    "ccs": Mark(ORANGE, "p"),
    "el2n-adv": Mark(ORANGE, ">", line="--"),
    "robust-failure": Mark(ORANGE, "<", line=":"),
    "dynamic-uncertainty": Mark(ORANGE, "h", line="-."),
    "input-gradient": Mark(BROWN, "d"),
    "dedup": Mark(BROWN, "*", line="--"),
    "uniform-eps": Mark(INK, "o", hollow=True, line="--"),
    "trades-weight": Mark(MUTED, "s", hollow=True, line=":"),
    "cap-only": Mark(RED, "^", hollow=True, line="--"),
    "random-cap": Mark(RED, "v", hollow=True, line=":"),
    "puma-shuffled": Mark(RED, "D", hollow=True, line="-."),
    "easy-matched": Mark(BLUE, "s", hollow=True, line="--"),
}


def mark(strategy: str) -> Mark:
    """The fixed look of a strategy; one that is not ours gets a look of its own by its name, the same every time."""
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
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "puma",
    "pdf.fonttype": 42,
    "pdf.use14corefonts": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's settings for everything drawn or saved inside, whatever the user's own are."""
    with rc_context():
        defaults: Any = {name: rcParamsDefault[name] for name in rcParamsDefault if name not in _UNTOUCHED}
        rcParams.update(defaults)
        rcParams.update(_RC)
        yield


def new_figure(
    width: float = 6.0, height: float = 3.7, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` x ``height`` inches and its axes in reading order; call it inside `house_style`.

    Six inches keep 8-point text readable when the page is 400 pixels wide.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(grid.ravel())
