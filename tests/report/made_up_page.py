"""A run's page filled with hostile text, for the tests of pages."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from puma.plots import BLUE, figure_style, new_figure
from puma.report.page import Picture, Report, Table
from puma.tradeoff import Estimate

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def make_figure() -> Figure:
    """A line whose label is neither mathtext nor markup."""
    with figure_style():
        figure, (axes,) = new_figure(4, 3)
        axes.plot([0, 1], [0, 1], color=BLUE, label="$x_1$ <b>")
        axes.legend()
    return figure


def hostile_report(**values: Any) -> Report:
    """Hostile text in every place that takes text."""
    more = {f"a rather long column {i}": "number" for i in range(7)} | {HOSTILE: "number"}
    rows = [
        ["b, with comma", 0.51, *range(8)],
        ["a", Estimate(0.09, 0.08, 0.1, 3), *range(8)],
        [HOSTILE, None, *range(8)],
        ["c", 10, *range(8)],
    ]
    report = Report("run.html.j2", HOSTILE)
    report.pictures["training"] = Picture(make_figure(), HOSTILE)
    report.tables["evaluation"] = Table({"name": "text", "robust": "number"} | more, rows)
    settings = {HOSTILE: {HOSTILE: [HOSTILE], "fingerprint": "0123456789abcdef" * 4, "image": np.float32(1)}}
    report.values = {
        "finished": True,
        "steps": 1,
        "threat": HOSTILE,
        "best": None,
        "evaluation": ("last", {"attack": HOSTILE, "clean_accuracy": 0.9, "attacked_accuracy": 0.5, "n_test": 9}),
        "weaker": [HOSTILE],
        "settings": settings,
    } | values
    return report
