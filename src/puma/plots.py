"""Matplotlib style of every figure of PUMA, on white; one marker per strategy; plots of single artefacts from arrays.

Reports make figures with `new_figure` inside `figure_style`, never through pyplot: no global state, safe in servers.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from matplotlib import rc_context, rcParams, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, MUTED, GRID, PAPER = "#1f2328", "#6a727c", "#dfe3e8", "#ffffff"
# Okabe and Ito's palette, darkened where the original is too pale for a thin line on white.
BLUE, SKY, GREEN, ORANGE = "#0072b2", "#3a9bd9", "#00845f", "#c27c00"
RED, PURPLE, GREY, BROWN = "#d55e00", "#b0578d", "#737b85", "#7a5230"

CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BROWN, GREY)  # of series that are not strategies


class Mark(NamedTuple):
    """Look of one strategy in every figure: colour, marker, hollow marker (a control), kind of line."""

    colour: str
    marker: str
    hollow: bool = False
    line: str = "-"

    @property
    def dot(self) -> dict[str, Any]:
        """Keywords of `Axes.plot` for its marker."""
        return {"marker": self.marker, "color": self.colour, "markerfacecolor": PAPER if self.hollow else self.colour}


MARKS = {
    "none": Mark(INK, "o"), "puma": Mark(RED, "D"), "puma-plus": Mark(PURPLE, "P"),
    "easy": Mark(BLUE, "s"), "difficult": Mark(SKY, "v", line="--"), "random": Mark(GREY, "X", line=":"),
    "ccs": Mark(GREEN, "p", line="--"), "el2n-adv": Mark(ORANGE, ">", line="--"), "dedup": Mark(BROWN, "*", line="--"),
    "robust-failure": Mark(ORANGE, "<", line=":"), "dynamic-uncertainty": Mark(ORANGE, "h", line="-."),
    "input-gradient": Mark(BROWN, "d"), "uniform-eps": Mark(INK, "o", hollow=True, line="--"),
    "trades-beta": Mark(MUTED, "s", hollow=True, line=":"), "cap-only": Mark(RED, "^", hollow=True, line="--"),
    "random-cap": Mark(RED, "v", hollow=True, line=":"), "puma-shuffled": Mark(RED, "D", hollow=True, line="-."),
    "easy-matched": Mark(BLUE, "s", hollow=True, line="--"),
}  # fmt: skip


def mark(strategy: str) -> Mark:
    """Fixed look of a strategy; an unknown strategy gets one derived from its name, the same every time."""
    code = zlib.crc32(strategy.encode())
    return MARKS.get(strategy) or Mark(CYCLE[code % len(CYCLE)], "osD^v<>pPXh*"[code // 8 % 12])


_RC: Any = {
    "font.family": ["DejaVu Sans"], "font.size": 9, "text.parse_math": False, "axes.prop_cycle": cycler(color=CYCLE),
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "lines.linewidth": 1.5, "lines.markersize": 6, "legend.frameon": False,
    "legend.fontsize": 8, "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "svg.fonttype": "none", "svg.hashsalt": "puma", "pdf.fonttype": 42, "pdf.use14corefonts": False,
}  # fmt: skip


@contextmanager
def figure_style() -> Iterator[None]:
    """Use PUMA's matplotlib settings for everything drawn or saved inside, whatever the user's own are."""
    with rc_context():
        ours = set(rcParamsDefault) - {"backend", "backend_fallback", "interactive"}
        rcParams.update({name: rcParamsDefault[name] for name in sorted(ours)} | _RC)
        yield


def new_figure(
    width: float = 5.0, height: float = 3.4, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``width`` x ``height`` inches and its axes in reading order; call it inside `figure_style`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel())


def svg_text(figure: Figure) -> str:
    """Text of a figure as a complete SVG file on white; equal figures give equal bytes."""
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
    return text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif") + "\n"


def unit(norm: str) -> tuple[float, str]:
    """Factor and words in which margins and eps are shown: 1/255 in Linf, pixel units in L2."""
    return (255.0, f"{norm}, in 1/255") if norm == "Linf" else (1.0, norm)


@figure_style()
def plot_margins(
    margins: Mapping[str, NDArray[np.float32]], norm: str, eps: float | None = None, axes: Axes | None = None
) -> Axes:
    """Plot a histogram of finite margins (status -> pixel units) by status, in percent; dashed lines are 0 and eps.

    The outermost thousandth is counted in the end bins. Returns the axes, by default of a new pyplot figure.
    """
    axes, (factor, words) = axes or new_axes(), unit(norm)
    found = {name: factor * values[np.isfinite(values)] for name, values in margins.items()}
    found = {name: values for name, values in found.items() if len(values)}
    low, high = np.quantile(np.concatenate([*found.values(), np.zeros(1)]), [0.001, 0.999])
    edges = np.linspace(min(low, 0.0), max(high, low + 1.0), 61)
    colours = {"crossed": BLUE, "misclassified": RED, "estimated": GREEN}
    base, share = np.zeros(60), 100 / max(sum(map(len, margins.values())), 1)
    for name, values in found.items():
        top = base + share * np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        axes.stairs(top, edges, baseline=base, fill=True, color=colours.get(name, GREY), label=name)
        base = top
    axes.axvline(0, color=INK, linewidth=0.9, linestyle="--")
    if eps is not None:
        axes.axvline(eps * factor, color=MUTED, linewidth=0.9, linestyle="--")
        _name_line(axes, eps * factor, "eps")
    axes.set(xlabel=f"margin ({words}); higher is easier", ylabel="% of images", ylim=(0, 1.1 * float(base.max()) or 1))
    axes.legend(loc="best")
    return axes


@figure_style()
def plot_eps(eps: NDArray[np.float32], norm: str, axes: Axes | None = None) -> Axes:
    """Plot a histogram of the eps of kept images ``[kept]``, in percent; dashed: the mean. Returns axes as above."""
    axes, (factor, words) = axes or new_axes(), unit(norm)
    edges = np.linspace(0, factor * float(eps.max(initial=0)) * 1.0001 or 1.0, 41)
    shares = 100 * np.histogram(eps * factor, edges)[0] / max(len(eps), 1)
    mean = factor * float(eps.mean()) if len(eps) else 0.0
    axes.stairs(shares, edges, fill=True, color=BLUE, alpha=0.85)
    axes.axvline(mean, color=INK, linewidth=0.9, linestyle="--")
    _name_line(axes, mean, f"mean {mean:.3g}")
    axes.set(xlabel=f"eps of kept images ({words})", ylabel="% of kept images", ylim=(0, 1.1 * shares.max() or 1))
    return axes


def _name_line(axes: Axes, x: float, name: str) -> None:
    axes.text(x, 0.99, f" {name}", transform=axes.get_xaxis_transform(), va="top", size=7.5, color=MUTED)


def new_axes() -> Axes:
    """Axes of a new pyplot figure, which a notebook shows."""
    from matplotlib import pyplot

    with figure_style():
        return pyplot.subplots(figsize=(5.0, 3.4), layout="constrained")[1]
