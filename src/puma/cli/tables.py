"""Tables in the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Results of a study, one line per cell and checkpoint."""
    table = Table(title="clean and robust accuracy (AutoAttack standard) with 95 % intervals")
    for head in ("strategy", "seed", "checkpoint", "kept", "mean eps", "clean", "robust", "judged on"):
        table.add_column(head, justify="left" if head in ("strategy", "checkpoint") else "right")
    for row in rows:
        params = ", ".join(f"{key}={value}" for key, value in json.loads(row["params"]).items())
        table.add_row(
            f"{row['strategy']}({params})" if params else row["strategy"],
            str(row["seed"]),
            row["checkpoint"],
            f"{row['kept']:,}",
            f"{row['mean_eps']:.3f}",
            f"{row['clean_accuracy']:.1%}",
            _with_interval(row["robust_accuracy"], row["n_test"]),
            f"{row['n_test']:,}",
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
    return f"{share:.1%} ± {(high - low) / 2:.1%}"
