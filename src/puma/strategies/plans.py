"""From a margin table to a plan: check, prune by quotas, count, warn, refuse; and the removal of label issues."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, UsageError, integer, number
from puma.margins import LABEL_ISSUE, LABEL_QUALITY, MarginTable, Status
from puma.plan import Plan
from puma.strategies.quotas import make_quotas
from puma.strategies.registry import STRATEGIES, Selection, SelectionContext, get_strategy
from puma.strategies.selectors import read_features
from puma.threat import ThreatModel

logger = logging.getLogger("puma")
# A plan warns above these shares of: rows without a margin; kept rows that the attack carries over the boundary (then
# training may collapse); kept rows with a lowered eps (then eps is large for the margin model).
NO_MARGIN_LIMIT, COLLAPSE_SHARE, LARGE_REACH = 0.01, 0.4, 0.5


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
            the strategy's scores, features are damaged or of another pool, or the plan would empty a class.
    """
    threat, rule = ThreatModel.parse(threat), get_strategy(strategy)
    resolved = rule.resolve(params)
    prune_fraction = number("prune_fraction", prune_fraction)
    if prune_fraction >= 1:
        why = "it is the share of the prunable images to remove; 0 removes nothing"
        raise UsageError(f"prune_fraction {prune_fraction!r} is not in [0, 1)", why=why, fix="30 % is written 0.3")
    seed = integer("seed", seed, low=0)
    if rule.compares and table.norm != threat.norm:
        raise DataError(
            f"the margins are in {table.norm}, the threat model is {threat}",
            why=f"strategy {rule.name!r} compares margins with eps, so both have to be in one norm",
            fix=f"score the pool with `--norm {threat.norm}`",
        )
    if not len(table):
        raise DataError("the margin table is empty", fix="score a pool with images in it")
    if isinstance(resolved.get("features"), (str, Path)):  # the vectors count, not where they lie
        resolved["features"] = read_features(resolved["features"], len(table), table.meta["pool"]["fingerprint"])
    share = prune_fraction if rule.prunes else 0.0
    quotas = make_quotas(table, share, protect_real=protect_real, class_balanced=class_balanced)
    context = SelectionContext(table, threat, quotas, seed)
    selection = rule.rule(context, **resolved)
    selection.eps[~selection.keep] = 0
    if empty := _emptied(table, np.ones(len(table), dtype=bool), selection.keep):
        raise DataError(
            f"the plan empties {len(empty)} of {len(np.unique(table.label))} classes ({_listed(empty)})",
            why="a model cannot learn a class it never sees",
            fix="use a smaller prune_fraction, or leave class_balanced and protect_real on",
        )
    counts = count(context, selection)
    warnings = find_warnings(context, selection, counts, rule.compares)
    for warning in warnings:
        logger.warning("%s: %s", strategy, warning)
    meta = {
        "strategy": strategy,
        "params": {name: _recorded(value) for name, value in resolved.items() if value is not None},
        "prune_fraction": share,
        "seed": seed,
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


def _emptied(table: MarginTable, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> list[int]:
    counts = [np.bincount(table.label[rows], minlength=table.num_classes) for rows in (before, after)]
    return [int(label) for label in np.flatnonzero((counts[0] > 0) & (counts[1] == 0))]


def _listed(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:5])) + (", ..." if len(labels) > 5 else "")


def _recorded(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # a mapped file stays mapped
        return "sha256:" + hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
    return value


# --- counts and warnings -------------------------------------------------------------------------------------------


def regime(table: MarginTable, threat: ThreatModel) -> dict[str, float]:
    """How large eps is for this margin model: the first two numbers to look at before a plan is made.

    ``misclassified``, the share of rows with a margin below 0, and ``below_eps``, with 0 < margin < eps, in [0, 1] over
    the rows that have a margin; empty where there is none or the norm is another. CIFAR-10 at its published scale has
    about 0.08 and 0.3.
    """
    margin = table.margin[~np.isnan(table.margin)]
    if table.norm != threat.norm or not len(margin):
        return {}
    below = (margin > 0) & (margin < np.float32(threat.eps))
    return {"misclassified": float(np.mean(margin < 0)), "below_eps": float(np.mean(below))}


def count(context: SelectionContext, selection: Selection) -> dict[str, Any]:
    """Rows before and after, by source and class; misclassified rows; reach of the cap and mean eps.

    ``mislabelled_before`` and ``mislabelled_after`` are the shares of rows whose attack reaches beyond the margin (0 <
    margin < eps_i): of all rows at full eps, and of the kept rows at their own eps. ``reach`` is the share of kept rows
    with eps_i < eps. They and `regime` are left out where margins are in another norm than the threat model.
    """
    table, keep = context.table, selection.keep
    kept, margin = int(np.count_nonzero(keep)), table.margin
    misclassified = margin < 0
    per_source = np.bincount(table.source[keep], minlength=len(table.sources))
    before = np.bincount(table.label, minlength=table.num_classes)
    after = np.bincount(table.label[keep], minlength=table.num_classes)
    counts: dict[str, Any] = {
        "rows": len(table),
        "prunable": sum(len(quota.rows) for quota in context.quotas),
        "to_remove": sum(quota.remove for quota in context.quotas),
        "removed": len(table) - kept,
        "kept": kept,
        "mean_eps": float(selection.eps.sum(dtype=np.float64) / kept) if kept else 0.0,
        "without_margin": int(np.count_nonzero(np.isnan(margin))),
        "misclassified": int(np.count_nonzero(misclassified)),
        "misclassified_kept": int(np.count_nonzero(misclassified & keep)),
        "unattacked": int(np.count_nonzero(keep & (selection.eps == 0))),
        "by_source": [
            {"name": source["name"], "role": source["role"], "rows": source["rows"], "kept": int(rows)}
            for source, rows in zip(table.sources, per_source, strict=True)
        ],
        "by_class": [{"rows": int(a), "kept": int(b)} for a, b in zip(before, after, strict=True)],
    }
    if facts := regime(table, context.threat):
        positive = margin > 0
        counts["regime"] = facts
        counts["mislabelled_before"] = float(np.mean(positive & (margin < np.float32(context.threat.eps))))
        counts["mislabelled_after"] = float(np.count_nonzero(positive & (margin < selection.eps))) / max(kept, 1)
        finite = keep & np.isfinite(margin)
        if finite.any():
            counts["mean_margin"] = float(margin[finite].mean(dtype=np.float64))
        if "c" in selection.derived:
            reach = margin < np.float32(context.threat.eps / selection.derived["c"])
            counts["reach"] = float(np.count_nonzero(reach & keep)) / max(kept, 1)
    return counts


def find_warnings(context: SelectionContext, selection: Selection, counts: dict[str, Any], compares: bool) -> list[str]:
    """Sentences about a plan that may not do what its maker expects, each with its numbers."""
    warnings = []
    rows, kept, absent = counts["rows"], counts["kept"], counts["without_margin"]
    if absent > NO_MARGIN_LIMIT * rows and absent < rows:
        warnings.append(
            f"{absent} of {rows} rows ({absent / rows:.1%}) have no margin: they are kept unless drawn, at full eps"
        )
    if (missing := counts["to_remove"] - counts["removed"]) > 0:
        warnings.append(f"{missing} rows fewer than asked could be removed: the others have no score")
    if compares:
        limit = np.float32(context.threat.eps / selection.derived.get("c", 1.0))
        used = selection.keep & (context.table.margin < limit)
        if estimated := int(np.count_nonzero(used & (context.table.status == Status.ESTIMATED))):
            warnings.append(
                f"the eps of {estimated} kept rows rests on first-order estimates of the margin, which order images "
                "but do not measure them: score with `--mode refined`, or with a larger `--refine-below`"
            )
    share, eps, margin = counts.get("mislabelled_after", 0.0), counts["mean_eps"], counts.get("mean_margin", np.inf)
    if share > COLLAPSE_SHARE:
        warnings.append(
            f"training may collapse: the attack carries {share:.0%} of the kept images over the margin model's "
            f"boundary, and in the linear two-class task training fails when about half of them are (warned above "
            f"{COLLAPSE_SHARE:.0%}); cap the attack (puma), prune less, or lower eps"
        )
    if 0 < margin <= eps or (margin <= 0 and eps > 0):
        warnings.append(
            f"training may collapse: mean eps {eps:.4g} is not below the kept images' mean margin {margin:.4g} (the "
            "collapse law of the linear two-class task); cap the attack (puma), prune less, or lower eps"
        )
    if counts.get("reach", 0.0) > LARGE_REACH:
        warnings.append(
            f"eps is large for this margin model: eps is lowered on {counts['reach']:.0%} of the {kept} kept images, "
            f"not only on those of lowest margin ({counts['regime']['below_eps']:.0%} of all rows have 0 < margin < "
            "eps): compare with uniform-eps, lower eps, or use a better margin model"
        )
    return warnings


# --- label issues --------------------------------------------------------------------------------------------------


def label_issues(table: MarginTable, below: float | None = None) -> NDArray[np.bool_]:
    """The synthetic rows whose label is probably wrong, bool ``[N]``; real rows are never marked.

    Args:
        table: a table with the scores of `puma.scoring.labels.score_labels` (or `DataError`).
        below: None takes the rows flagged as ``label_issue``; a number in [0, 1] all rows whose ``label_quality`` is
            lower: 0.5 is every image that the model gives another class, 0.25 only those it is sure of.
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
    """Remove likely label errors from a plan, in addition to what its strategy removed; all else stays as it is.

    Where a better model disagrees with the label a generated image was asked for, a low or negative margin means "wrong
    label" rather than "hard image", and no smaller eps repairs that.

    Args:
        plan: any plan of the pool.
        table: the margin table of the pool, with the scores of `puma.scoring.labels.score_labels` joined.
        below: see `label_issues`.

    Raises:
        DataError: plan and table are of different pools, the table lacks the scores, or a class would lose all images.
    """
    pools = [made.meta["pool"]["fingerprint"] for made in (plan, table)]
    if pools[0] != pools[1]:
        why, fix = f"{pools[0][:12]} and {pools[1][:12]}", "score the pool that the plan was made for"
        raise DataError("plan and table are of different pools", why=why, fix=fix)
    removed = label_issues(table, below) & plan.keep
    keep = plan.keep & ~removed
    if empty := _emptied(table, plan.keep, keep):
        raise DataError(
            f"every image that the plan keeps of class {_listed(empty)} is a label issue",
            why="a model cannot learn a class it never sees",
            fix="--below removes fewer, as in --below 0.25; or check the margin model: it may not know this class",
        )
    selection = Selection(keep, np.where(keep, plan.eps, 0).astype(np.float32), plan.meta["derived"], plan.beta)
    options = {name: plan.meta[name] for name in ("protect_real", "class_balanced")}
    quotas = make_quotas(table, plan.meta["prune_fraction"], **options)
    context = SelectionContext(table, plan.threat, quotas, plan.meta["seed"])
    counts, rule = count(context, selection), STRATEGIES.get(plan.strategy)  # None: a selection of somebody's own
    meta = {
        **plan.meta,
        "counts": counts,
        "warnings": find_warnings(context, selection, counts, rule is not None and rule.compares),
        "label_issues": {"removed": int(removed.sum()), "below": below, "table": table.fingerprint},
    }
    return replace(plan, keep=keep, eps=selection.eps, meta=meta)
