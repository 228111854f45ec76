"""From a margin table to a plan: check, prune by quotas, count, warn, refuse."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from puma.errors import DataError, UsageError, integer, number
from puma.margins import MarginTable, Status
from puma.plan import Plan
from puma.strategies.registry import Selection, SelectionContext, get_strategy, make_quotas
from puma.strategies.rules import regime
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
        threat: of the training to come.
        seed: for random choices, and for draws between equal scores.
        protect_real: remove synthetic rows only, if there are any.
        class_balanced: equal quotas for each source and class; otherwise one quota for all.
        **params: the strategy's own parameters, such as ``c=1.0``.

    The plan's warnings are also given to the logger ``puma``. `UsageError` for an unknown strategy or parameter, or a
    value out of its range; `DataError` for margins in another norm than the threat model if the strategy compares them,
    missing scores, features that are damaged or of another pool, or a plan that would empty a class.
    """
    threat, rule = ThreatModel.parse(threat), get_strategy(strategy)
    resolved = rule.resolve(params)
    prune_fraction = number("prune_fraction", prune_fraction)
    if prune_fraction >= 1:
        why = "it is the share of the prunable images to remove; 0 removes nothing"
        raise UsageError(f"prune_fraction {prune_fraction!r} is not in [0, 1)", why=why, fix="30 % is written 0.3")
    seed = integer("seed", seed, low=0)
    if rule.compares and table.norm != threat.norm:
        why = f"strategy {rule.name!r} compares margins with eps, so both have to be in one norm"
        fix = f"score the pool with `--norm {threat.norm}`"
        raise DataError(f"the margins are in {table.norm}, the threat model is {threat}", why=why, fix=fix)
    if not len(table):
        raise DataError("the margin table is empty", fix="score a pool with images in it")
    if isinstance(resolved.get("features"), (str, Path)):  # the vectors count, not where they lie
        resolved["features"] = read_features(resolved["features"], len(table), table.meta["pool"]["fingerprint"])
    share = prune_fraction if rule.prunes else 0.0
    quotas = make_quotas(table, share, protect_real=protect_real, class_balanced=class_balanced)
    context = SelectionContext(table, threat, quotas, seed)
    selection = rule.rule(context, **resolved)
    selection.eps[~selection.keep] = 0
    had = np.bincount(table.label, minlength=table.num_classes)
    has = np.bincount(table.label[selection.keep], minlength=table.num_classes)
    if len(empty := np.flatnonzero((had > 0) & (has == 0))):
        listed = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        what = f"the plan empties {len(empty)} of {np.count_nonzero(had)} classes ({listed})"
        fix = "use a smaller prune_fraction, or leave class_balanced and protect_real on"
        raise DataError(what, why="a model cannot learn them", fix=fix)
    described = _describe(context, selection, rule.compares)
    for warning in described["warnings"]:
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
        "derived": dict(selection.derived),
        **described,
    }
    return Plan(selection.keep, selection.eps, meta, selection.beta)


def _recorded(value: Any) -> Any:
    array = isinstance(value, np.ndarray)
    return "sha256:" + hashlib.sha256(np.ascontiguousarray(value).data).hexdigest() if array else value


def _describe(context: SelectionContext, selection: Selection, compares: bool) -> dict[str, Any]:
    """The ``counts`` of a plan, and ``warnings`` if it may not do what its maker expects, each with its numbers."""
    table, keep, eps = context.table, selection.keep, np.float32(context.threat.eps)
    rows, kept, margin, c = len(table), int(np.count_nonzero(keep)), table.margin, selection.derived.get("c")
    per_source = np.bincount(table.source[keep], minlength=len(table.sources))
    before = np.bincount(table.label, minlength=table.num_classes)
    after = np.bincount(table.label[keep], minlength=table.num_classes)
    counts: dict[str, Any] = {
        "rows": rows,
        "prunable": sum(len(quota.rows) for quota in context.quotas),
        "to_remove": sum(quota.remove for quota in context.quotas),
        "removed": rows - kept,
        "kept": kept,
        "mean_eps": (mean_eps := float(selection.eps.sum(dtype=np.float64) / kept) if kept else 0.0),
        "without_margin": (absent := int(np.count_nonzero(np.isnan(margin)))),
        "misclassified": int(np.count_nonzero(margin < 0)),
        "misclassified_kept": int(np.count_nonzero((margin < 0) & keep)),
        "unattacked": int(np.count_nonzero(keep & (selection.eps == 0))),
        "by_source": [
            {"name": source["name"], "role": source["role"], "rows": source["rows"], "kept": int(of_source)}
            for source, of_source in zip(table.sources, per_source, strict=True)
        ],
        "by_class": [{"rows": int(a), "kept": int(b)} for a, b in zip(before, after, strict=True)],
    }
    lowered = margin < (eps if c is None else np.float32(context.threat.eps / c))
    if facts := regime(table, context.threat):
        counts["regime"] = facts  # then shares of rows with 0 < margin < eps_i: of all at full eps, of the kept
        counts["mislabelled_before"] = float(np.mean((margin > 0) & (margin < eps)))
        counts["mislabelled_after"] = float(np.count_nonzero((margin > 0) & (margin < selection.eps))) / max(kept, 1)
        finite = keep & np.isfinite(margin)
        if finite.any():
            counts["mean_margin"] = float(margin[finite].mean(dtype=np.float64))
        if c is not None:
            counts["reach"] = float(np.count_nonzero(lowered & keep)) / max(kept, 1)
    estimated = int(np.count_nonzero(keep & lowered & (table.status == Status.ESTIMATED))) if compares else 0
    missing, reach, below = counts["to_remove"] - counts["removed"], counts.get("reach", 0.0), facts.get("below_eps", 0)
    share, mean = counts.get("mislabelled_after", 0.0), counts.get("mean_margin", np.inf)
    warnings = {
        f"{absent} of {rows} rows ({absent / rows:.1%}) have no margin: they are kept unless drawn, at full eps": (
            NO_MARGIN_LIMIT * rows < absent < rows
        ),
        f"{missing} rows fewer than asked could be removed: the others have no score": missing > 0,
        f"the eps of {estimated} kept rows rests on first-order estimates of the margin, which order images "
        "but do not measure them: score with `--mode refined`, or with a larger `--refine-below`": estimated > 0,
        f"training may collapse: the attack carries {share:.0%} of the kept images over the margin model's "
        f"boundary, and in the linear two-class task training fails when about half of them are (warned above "
        f"{COLLAPSE_SHARE:.0%}); cap the attack (puma), prune less, or lower eps": share > COLLAPSE_SHARE,
        f"training may collapse: mean eps {mean_eps:.4g} is not below the kept images' mean margin {mean:.4g} (the "
        "collapse law of the linear two-class task); cap the attack (puma), prune less, or lower eps": (
            0 < mean <= mean_eps or (mean <= 0 and mean_eps > 0)
        ),
        f"eps is large for this margin model: eps is lowered on {reach:.0%} of the {kept} kept images, not only on "
        f"those of lowest margin ({below:.0%} of all rows have 0 < margin < eps): compare with uniform-eps, lower eps, "
        "or use a better margin model": reach > LARGE_REACH,
    }
    return {"counts": counts, "warnings": [text for text, holds in warnings.items() if holds]}
