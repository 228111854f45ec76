"""Tables in the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

if TYPE_CHECKING:
    from puma.study.status import Line


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Results of a study, one line per strategy and checkpoint (means over seeds), within 80 columns."""
    column = next((name for name in _ATTACKS if any(row.get(name) is not None for row in rows)), "apgd_accuracy")
    attack, size = _ATTACKS[column]
    images = ", ".join(sorted({f"{row[size]:,}" for row in rows if row.get(column) is not None}))
    several = len({row["seed"] for row in rows}) > 1
    remark = "means over seeds; intervals: see the report" if several else "95 % interval"
    title = f"robust: {attack} on {images} test images, {remark}"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    shown = [
        name for name in ("pool", "recipe", "prune_fraction", "checkpoint") if len({row[name] for row in rows}) > 1
    ]
    for head in ("strategy", *(_HEADS[name] for name in shown), "seeds", "kept", "mean eps", "clean", "robust"):
        table.add_column(head, justify="left" if head in ("strategy", "pool") else "right", no_wrap=head != "strategy")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("strategy", "params", "pool", "recipe", "prune_fraction", "checkpoint"))
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        first, count = group[0], len(group)
        params = " ".join(f"{key}={value}" for key, value in json.loads(first["params"]).items())
        table.add_row(
            f"{first['strategy']} {params}",
            *(_HOW[name](first[name]) for name in shown),
            str(count),
            f"{first['kept']:,}",
            f"{sum(row['mean_eps'] for row in group) / count:.3f}",
            f"{sum(row['clean_accuracy'] for row in group) / count:.1%}",
            _accuracy([row[column] for row in group], None if several else first[size]),
        )
    return table


_ATTACKS = {
    "robust_accuracy": ("AutoAttack standard", "n_test"),
    "apgd_accuracy": ("APGD-CE", "n_test"),
    "pgd_accuracy": ("CE + CW PGD", "n_pgd"),
}
_HEADS = {"pool": "pool", "recipe": "recipe", "prune_fraction": "prune", "checkpoint": "model"}
_HOW: dict[str, Callable[[Any], str]] = {
    "pool": lambda pool: f"{sum(map(int, re.findall(r'[(]([0-9]+)[)]', pool))):,}",
    "recipe": lambda recipe: Path(recipe).stem,
    "prune_fraction": lambda share: f"{share:g}",
    "checkpoint": str,
}
_MARKS = {"finished": "x", "evaluating": "/", "running": "o", "waiting": "."}
GRID_LEGEND = "x finished, / being evaluated, o running, . waiting; accuracies: means over finished seeds"


def grid_table(lines: list[Line]) -> Table:
    """The grid of a study: a line per strategy, a column per seed."""
    seeds = sorted({seed for line in lines for seed in line.states if seed is not None})
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("task, strategy by seed")
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


def _accuracy(shares: list[float | None], images: int | None) -> str:
    """The mean of some shares; of one alone, with the half-width of its 95 % interval over ``images``."""
    known = [share for share in shares if share is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    if images is None:
        return f"{mean:.1%}"
    from puma.tradeoff import wilson_interval

    low, high = wilson_interval(mean, images)
    return f"{mean:.1%} ±{(high - low) * 50:.1f}"
