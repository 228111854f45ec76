"""From a margin table to a plan: check, prune by quotas, describe, warn, refuse."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from puma.errors import DataError, UsageError
from puma.margins import MarginTable
from puma.plan import Plan
from puma.strategies.describe import count, doubts
from puma.strategies.features import read_features
from puma.strategies.problem import Choice, Problem
from puma.strategies.quotas import make_quotas
from puma.strategies.registry import Strategy, get_strategy
from puma.threat import ThreatModel

logger = logging.getLogger("puma")


def make_plan(
    table: MarginTable,
    strategy: str = "puma",
    prune_fraction: float = 0.3,
    *,
    threat: ThreatModel | str,
    seed: int = 0,
    protect_real: bool = True,
    class_balanced: bool = True,
    **params: Any,
) -> Plan:
    """Decide which images are trained on and how hard each is attacked. Pure: same inputs, same plan.

    Args:
        table: the margin table of the pool (with other scores joined, for strategies that use them).
        strategy: a name from `puma.strategies.names`.
        prune_fraction: share of the prunable rows to remove, in [0, 1); exact for each source and class by largest
            remainder. Strategies that prune nothing (``none``, ``uniform-eps``, ...) take no notice of it.
        threat: the threat model of the training to come, or its text ``"Linf:8/255"``.
        seed: for strategies that draw, and for draws between equal scores.
        protect_real: remove synthetic rows only, if there are any.
        class_balanced: equal quotas for each source and class; otherwise one quota for all.
        **params: the strategy's own parameters, such as ``c=0.5``.

    Returns:
        The plan; ``plan.meta["warnings"]`` says what is doubtful about it, and so does the logger ``puma``.

    Raises:
        UsageError: unknown strategy or parameter, or a value out of its range.
        DataError: the table is in another norm than the threat model and the strategy compares the two, the table lacks
            the strategy's scores, features are damaged or of another pool, labels are out of range, or the plan would
            empty a class.
    """
    if isinstance(threat, str):
        threat = ThreatModel.parse(threat)
    rule = get_strategy(strategy)
    resolved = rule.resolve(params)
    _check(table, rule, prune_fraction, threat, seed)
    if isinstance(resolved.get("features"), (str, Path)):  # the vectors count, not where they lie
        resolved["features"] = read_features(resolved["features"], len(table), table.meta["pool"]["fingerprint"])
    share = prune_fraction if rule.prunes else 0.0
    quotas = make_quotas(table, share, protect_real=protect_real, class_balanced=class_balanced)
    problem = Problem(table, threat, quotas, seed)
    choice = rule.rule(problem, **resolved)
    choice.eps[~choice.keep] = 0
    _refuse_empty_class(table, choice)
    counts = count(problem, choice)
    warnings = doubts(problem, choice, counts, rule)
    for warning in warnings:
        logger.warning("%s: %s", strategy, warning)
    meta = {
        "strategy": strategy,
        "params": {name: _recorded(value) for name, value in resolved.items() if value is not None},
        "prune_fraction": float(share),
        "seed": int(seed),
        "protect_real": bool(protect_real),
        "class_balanced": bool(class_balanced),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "table": table.fingerprint,
        "pool": dict(table.meta["pool"]),
        "counts": counts,
        "derived": dict(choice.derived),
        "warnings": warnings,
    }
    return Plan(choice.keep, choice.eps, meta, choice.trades_weight)


def _check(table: MarginTable, rule: Strategy, prune_fraction: float, threat: ThreatModel, seed: int) -> None:
    number = isinstance(prune_fraction, (int, float)) and not isinstance(prune_fraction, bool)
    if not number or not 0 <= prune_fraction < 1:
        raise UsageError(
            f"prune_fraction {prune_fraction!r} is not in [0, 1)",
            why="it is the share of the prunable images to remove; 0 removes nothing",
            fix="30 % is written 0.3",
        )
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"seed {seed!r} is not a whole number from 0 on")
    if rule.compares and table.norm != threat.norm:
        raise DataError(
            f"the margins are in {table.norm}, the threat model is {threat}",
            why=f"strategy {rule.name!r} compares margins with eps, so both have to be in one norm",
            fix=f"score the pool with `--norm {threat.norm}`",
        )
    if not len(table):
        raise DataError("the margin table is empty", fix="score a pool with images in it")
    if table.label.min() < 0 or table.label.max() >= table.num_classes:
        raise DataError(
            f"labels from {table.label.min()} to {table.label.max()} in a table of {table.num_classes} classes",
            fix="score the pool again, with the data set's own number of classes",
        )


def _refuse_empty_class(table: MarginTable, choice: Choice) -> None:
    before = np.bincount(table.label, minlength=table.num_classes)
    after = np.bincount(table.label[choice.keep], minlength=table.num_classes)
    empty = np.flatnonzero((before > 0) & (after == 0))
    if len(empty):
        named = ", ".join(str(label) for label in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise DataError(
            f"the plan empties {len(empty)} of {np.count_nonzero(before)} classes ({named})",
            why="a model cannot learn a class it never sees",
            fix="use a smaller prune_fraction, or leave class_balanced and protect_real on",
        )


def _recorded(value: Any) -> Any:
    """A parameter as the metadata keeps it: arrays by their content's fingerprint, all else as it is."""
    if isinstance(value, np.ndarray):
        import hashlib

        return "sha256:" + hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()  # a mapped file stays mapped
    return value
