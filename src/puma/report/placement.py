"""Labels beside points that cover neither each other nor the points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from puma.report.style import INK, MUTED

_RADII = (7, 12, 18, 26, 36, 48, 62)
_ANGLES = (0, 45, -45, 180, 135, -135, 90, -90, 22, -22, 158, -158)
_POINT_SIZE = 8.0


def place_labels(
    axes: Axes,
    points: NDArray[np.float64],
    labels: Sequence[str],
    colours: Sequence[str] | None = None,
    lines: Sequence[NDArray[np.float64]] = (),
    size: float = 7.5,
) -> list[Bbox]:
    """Write ``labels`` beside ``points``, each in the nearest free place; a thin line leads to one that is further off.

    Greedy and deterministic. Call it when everything else is drawn: the figure's layout is fixed here.

    Args:
        axes: where the points are drawn.
        points: float64 ``[N, 2]`` in data coordinates, finite.
        labels: N texts.
        colours: N colours of the texts; ink for all where left out.
        lines: polylines ``[M, 2]`` in data coordinates that labels had better not cover.
        size: font size in points.

    Returns:
        The N boxes the labels take, in pixels.
    """
    figure = axes.figure
    canvas = FigureCanvasAgg(figure)  # type: ignore[arg-type]
    canvas.draw()  # type: ignore[no-untyped-call]
    figure.set_layout_engine("none")  # type: ignore[union-attr]
    scale = figure.dpi / 72
    frame = axes.get_window_extent()
    places = axes.transData.transform(points) if len(points) else np.empty((0, 2))
    taken = [_around(x, y, _POINT_SIZE * scale, _POINT_SIZE * scale) for x, y in places]
    for line in lines:
        taken += [_around(x, y, 3 * scale, 3 * scale) for x, y in _along(axes.transData.transform(line), 4 * scale)]
    boxes: list[Bbox] = []
    colours = colours or [INK] * len(labels)
    for (x, y), point, label, colour in zip(places, points, labels, colours, strict=True):
        width, height = _extent(axes, label, size, canvas)
        best = min(
            (_candidate(x, y, width, height, radius * scale, angle) for radius in _RADII for angle in _ANGLES),
            key=lambda box: _cost(box, [*taken, *boxes], frame, x, y),
        )
        boxes.append(best)
        _write(axes, point, best, label, colour, size, far=_distance(best, x, y) > 1.6 * _RADII[0] * scale)
    return boxes


def _write(axes: Axes, point: NDArray[np.float64], box: Bbox, label: str, colour: str, size: float, far: bool) -> None:
    at = axes.transData.inverted().transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
    arrow = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3} if far else None
    text = axes.annotate(
        label,
        tuple(point),
        tuple(at),
        ha="center",
        va="center",
        fontsize=size,
        color=colour,
        arrowprops=arrow,
        zorder=6,
    )
    text.set_in_layout(False)


def _extent(axes: Axes, label: str, size: float, canvas: FigureCanvasAgg) -> tuple[float, float]:
    text = axes.text(0, 0, label, fontsize=size)
    box = text.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]
    text.remove()
    return box.width + 3, box.height + 2


def _candidate(x: float, y: float, width: float, height: float, radius: float, angle: float) -> Bbox:
    """The label's box when its nearest edge lies ``radius`` from the point in the direction ``angle``."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return _around(x + cos * (radius + width / 2), y + sin * (radius + height / 2), width, height)


def _along(corners: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Points every ``step`` pixels along a polyline."""
    pieces = [
        start + (end - start) * np.linspace(0, 1, max(2, int(np.hypot(*(end - start)) / step)))[:, None]
        for start, end in itertools.pairwise(corners)
    ]
    return np.concatenate(pieces) if pieces else np.empty((0, 2))


def _around(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _distance(box: Bbox, x: float, y: float) -> float:
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _cost(box: Bbox, taken: list[Bbox], frame: Bbox, x: float, y: float) -> float:
    """Overlap and leaving the frame weigh far more than any distance."""
    outside = box.width * box.height - _overlap(box, frame)
    return 1000 * (sum(_overlap(box, other) for other in taken) + outside) + _distance(box, x, y)
