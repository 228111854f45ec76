"""From a margin table to a plan: check, prune by quotas, count, warn, refuse; and the removal of label issues."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, UsageError
from puma.margins import LABEL_ISSUE, LABEL_QUALITY, MarginTable
from puma.plan import Plan
from puma.strategies.context import Selection, SelectionContext, number
from puma.strategies.counts import count, find_warnings
from puma.strategies.features import read_features
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
    """Decide which images are trained on and at which eps each is attacked. Pure: same inputs, same plan.

    Args:
        table: the margin table of the pool (with other scores joined, for strategies that use them).
        strategy: a name from `puma.strategies.names`.
        prune_fraction: share of the prunable rows to remove, in [0, 1); exact for each source and class by largest
            remainder. Strategies that prune nothing (``none``, ``uniform-eps``, ...) ignore it.
        threat: the threat model of the training to come, or its text ``"Linf:8/255"``.
        seed: for random choices, and for draws between equal scores.
        protect_real: remove synthetic rows only, if there are any.
        class_balanced: equal quotas for each source and class; otherwise one quota for all.
        **params: the strategy's own parameters, such as ``c=1.0``.

    Returns:
        The plan; ``plan.meta["warnings"]`` holds warnings, which are also given to the logger ``puma``.

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
    context = SelectionContext(table, threat, quotas, int(seed))
    selection = rule.rule(context, **resolved)
    selection.eps[~selection.keep] = 0
    _refuse_empty_class(table, selection)
    counts = count(context, selection)
    warnings = find_warnings(context, selection, counts, rule)
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
        "derived": dict(selection.derived),
        "warnings": warnings,
    }
    return Plan(selection.keep, selection.eps, meta, selection.beta)


def _check(table: MarginTable, rule: Strategy, prune_fraction: float, threat: ThreatModel, seed: int) -> None:
    real = isinstance(prune_fraction, (int, float, np.integer, np.floating)) and not isinstance(prune_fraction, bool)
    if not real or not 0 <= prune_fraction < 1:
        raise UsageError(
            f"prune_fraction {prune_fraction!r} is not in [0, 1)",
            why="it is the share of the prunable images to remove; 0 removes nothing",
            fix="30 % is written 0.3",
        )
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"seed {seed!r} is not an integer >= 0")
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


def _refuse_empty_class(table: MarginTable, selection: Selection) -> None:
    before = np.bincount(table.label, minlength=table.num_classes)
    after = np.bincount(table.label[selection.keep], minlength=table.num_classes)
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


def label_issues(table: MarginTable, below: float | None = None) -> NDArray[np.bool_]:
    """The synthetic rows whose label is probably wrong.

    Args:
        table: a table with the scores of `puma.scoring.labels.score_labels`.
        below: None takes the rows flagged as ``label_issue``; a number in [0, 1] all rows whose ``label_quality`` is
            lower: 0.5 is every image that the model gives another class, 0.25 only those it is sure of.

    Returns:
        bool ``[N]``; real rows are never marked.

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
    wrong = scores == 1 if below is None else scores < number("below", below, high=1)
    return np.asarray(table.synthetic & wrong)


def drop_label_issues(plan: Plan, table: MarginTable, below: float | None = None) -> Plan:
    """Remove likely label errors from a plan; everything else stays as it is.

    A generated image carries the label it was asked for. Where a better model disagrees, a low or negative margin means
    "wrong label" rather than "hard image", and no smaller eps repairs that. The rows are removed in addition to the
    strategy's, so fewer rows are kept than its prune fraction says.

    Args:
        plan: any plan of the pool.
        table: the margin table of the pool, with the scores of `puma.scoring.labels.score_labels` joined.
        below: see `label_issues`.

    Returns:
        A plan whose ``meta["label_issues"]`` says what was removed, with new counts and warnings.

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
    removed = label_issues(table, below) & plan.keep
    keep = plan.keep & ~removed
    before, after = (np.bincount(table.label[rows], minlength=table.num_classes) for rows in (plan.keep, keep))
    if len(empty := np.flatnonzero((before > 0) & (after == 0))):
        raise DataError(
            f"every image that the plan keeps of class {', '.join(map(str, empty[:5]))} is a label issue",
            why="a model cannot learn a class it never sees",
            fix="--below removes fewer, as in --below 0.25; or check the margin model: it may not know this class",
        )
    selection = Selection(keep, np.where(keep, plan.eps, 0).astype(np.float32), plan.meta["derived"], plan.beta)
    options = {name: plan.meta[name] for name in ("protect_real", "class_balanced")}
    quotas = make_quotas(table, plan.meta["prune_fraction"], **options)
    context = SelectionContext(table, plan.threat, quotas, plan.meta["seed"])
    counts = count(context, selection)
    meta = {
        **plan.meta,
        "counts": counts,
        "warnings": find_warnings(context, selection, counts, get_strategy(plan.strategy)),
        "label_issues": {"removed": int(removed.sum()), "below": below, "table": table.fingerprint},
    }
    return replace(plan, keep=keep, eps=selection.eps, meta=meta)
