"""Tables in the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.box import SIMPLE
from rich.table import Table


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


def grid_table(lines: list[dict[str, Any]]) -> Table:
    """The pieces of a study and their state."""
    table = Table()
    for head in ("piece", "state", "seconds", "clean", "robust"):
        table.add_column(head, justify="left" if head in ("piece", "state") else "right")
    for line in lines:
        seconds = "" if line["seconds"] is None else f"{line['seconds']:.0f}"
        shares = ["" if line[key] is None else f"{line[key]:.1%}" for key in ("clean", "robust")]
        table.add_row(line["cell"], line["state"], seconds, *shares)
    return table


def _with_interval(share: float | None, count: int) -> str:
    """A share and the half-width of its 95 % interval."""
    if share is None:
        return "-"
    from puma.tradeoff import wilson_interval

    low, high = wilson_interval(share, count)
    return f"{share:.1%} ±{(high - low) * 50:.1f}"
