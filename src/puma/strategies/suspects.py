"""Labels that are probably wrong, taken out of a plan after the strategy has spoken.

A generated image carries the label it was asked for. Where a model that knows better disagrees, its low or negative
margin says "wrong label" rather than "hard image", and no attack norm mends that. The columns come from
`puma.scoring.labels.score_labels`, joined to the margin table.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError
from puma.margins import LABEL_ISSUE, LABEL_QUALITY, MarginTable
from puma.plan import Plan
from puma.strategies.describe import count, doubts
from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.quotas import make_quotas
from puma.strategies.registry import get_strategy


def suspects(table: MarginTable, below: float | None = None) -> NDArray[np.bool_]:
    """The synthetic rows whose label is probably wrong.

    Args:
        table: a table with the scores of `puma.scoring.labels.score_labels`.
        below: None takes the rows flagged as ``label_issue``; a number in [0, 1] all rows whose ``label_quality`` is
            lower: 0.5 is every image that the model gives another class, 0.25 only those it is sure of.

    Returns:
        bool ``[N]``; real rows are never suspect.

    Raises:
        DataError: the table lacks the scores.
        UsageError: ``below`` outside [0, 1].
    """
    name = LABEL_ISSUE if below is None else LABEL_QUALITY
    if name not in table.scores:
        raise DataError(
            f"the table has no scores {name!r}",
            why=f"it has: {', '.join(sorted(table.scores)) or 'margins only'}",
            fix="make them with `puma data labels` and give that table too",
        )
    scores = table.scores[name]
    doubtful = scores == 1 if below is None else scores < fraction("below", below)
    return np.asarray(table.synthetic & doubtful)


def drop_suspects(plan: Plan, table: MarginTable, below: float | None = None) -> Plan:
    """The plan without the suspect rows that it keeps; everything else stays as it is.

    They go on top of what the strategy removed, so fewer rows are kept than its prune fraction says.

    Args:
        plan: any plan of the pool.
        table: the margin table of the pool, with the scores of `puma.scoring.labels.score_labels` joined.
        below: see `suspects`.

    Returns:
        A plan whose ``meta["suspects"]`` says what was taken out, with counts and warnings made anew.

    Raises:
        DataError: plan and table are of different pools, the table lacks the scores, or a class would lose all images.
        UsageError: ``below`` outside [0, 1].
    """
    if plan.meta["pool"]["fingerprint"] != table.meta["pool"]["fingerprint"]:
        raise DataError(
            "plan and table are of different pools",
            why=f"{plan.meta['pool']['fingerprint'][:12]} and {table.meta['pool']['fingerprint'][:12]}",
            fix="score the pool that the plan was made for",
        )
    gone = suspects(table, below) & plan.keep
    keep = plan.keep & ~gone
    before, after = (np.bincount(table.label[rows], minlength=table.num_classes) for rows in (plan.keep, keep))
    if len(empty := np.flatnonzero((before > 0) & (after == 0))):
        raise DataError(
            f"every image that the plan keeps of class {', '.join(map(str, empty[:5]))} is suspect",
            why="a model cannot learn a class it never sees",
            fix="--below takes out fewer, as in --below 0.25; or look at the margin model: it may not know this class",
        )
    choice = Choice(keep, np.where(keep, plan.eps, 0).astype(np.float32), plan.meta["derived"], plan.trades_weight)
    options = {name: plan.meta[name] for name in ("protect_real", "class_balanced")}
    problem = Problem(table, plan.threat, make_quotas(table, plan.meta["prune_fraction"], **options), plan.meta["seed"])
    counts = count(problem, choice)
    meta = {
        **plan.meta,
        "counts": counts,
        "warnings": doubts(problem, choice, counts, get_strategy(plan.strategy)),
        "suspects": {"dropped": int(gone.sum()), "below": below, "table": table.fingerprint},
    }
    return replace(plan, keep=keep, eps=choice.eps, meta=meta)
