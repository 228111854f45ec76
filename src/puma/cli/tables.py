"""Tables in the terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

if TYPE_CHECKING:
    from puma.study.status import Line


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Results of a study, one line per cell and checkpoint, within 80 columns."""
    judged = ", ".join(sorted({f"{row['n_test']:,}" for row in rows}))
    title = f"robust: AutoAttack standard on {judged} test images, 95 % interval"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("strategy")
    both = len({row["checkpoint"] for row in rows}) > 1
    for head in ("seed", *(["model"] if both else []), "kept", "mean eps", "clean", "robust"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        params = " ".join(f"{key}={value}" for key, value in json.loads(row["params"]).items())
        table.add_row(
            f"{row['strategy']} {params}",
            str(row["seed"]),
            *([row["checkpoint"]] if both else []),
            f"{row['kept']:,}",
            f"{row['mean_eps']:.3f}",
            f"{row['clean_accuracy']:.1%}",
            _with_interval(row["robust_accuracy"], row["n_test"]),
        )
    return table


_MARKS = {"finished": "x", "judging": "/", "running": "o", "waiting": "."}
GRID_LEGEND = "x finished, / being judged, o running, . waiting; accuracies: means over finished seeds"


def grid_table(lines: list[Line]) -> Table:
    """The grid of a study: a line per strategy, a column per seed."""
    seeds = sorted({seed for line in lines for seed in line.states if seed is not None})
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("piece, strategy by seed")
    for seed in seeds:
        table.add_column(str(seed), justify="center", no_wrap=True)
    table.add_column("clean", justify="right", no_wrap=True)
    table.add_column("robust", justify="right", no_wrap=True)
    for line in lines:
        if None in line.states:
            table.add_row(line.label, _MARKS[line.states[None]])
            continue
        marks = [_MARKS[line.states[seed]] if seed in line.states else "" for seed in seeds]
        shares = ["" if share is None else f"{share:.1%}" for share in (line.clean, line.robust)]
        table.add_row(line.label, *marks, *shares)
    return table


def _with_interval(share: float | None, count: int) -> str:
    """A share and the half-width of its 95 % interval."""
    if share is None:
        return "-"
    from puma.tradeoff import wilson_interval

    low, high = wilson_interval(share, count)
    return f"{share:.1%} ±{(high - low) * 50:.1f}"
