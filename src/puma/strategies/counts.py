"""Counts of a plan, the regime it was made in, and warnings about it."""

from __future__ import annotations

from typing import Any

import numpy as np

from puma.margins import MarginTable, Status
from puma.strategies.context import Selection, SelectionContext
from puma.strategies.registry import Strategy
from puma.threat import ThreatModel

NO_MARGIN_LIMIT = 0.01
"""Share of rows without a margin above which a plan warns."""

COLLAPSE_SHARE = 0.4
"""Share of kept rows that the attack carries over the boundary above which training may collapse."""

LARGE_REACH = 0.5
"""Share of the kept rows with a lowered eps above which eps is large for the margin model."""


def regime(table: MarginTable, threat: ThreatModel) -> dict[str, float]:
    """How large eps is for this margin model: the first two numbers to look at before a plan is made.

    CIFAR-10 at its published scale (WRN-28-10, 1 M images, Linf 8/255) has about 0.08 and 0.3.

    Returns:
        ``misclassified``, the share of rows with a margin below 0, and ``below_eps``, the share with 0 < margin < eps,
        both in [0, 1] over the rows that have a margin. Empty where the table is in another norm or has no margin.
    """
    margin = table.margin[~np.isnan(table.margin)]
    if table.norm != threat.norm or not len(margin):
        return {}
    below = (margin > 0) & (margin < np.float32(threat.eps))
    return {"misclassified": float(np.mean(margin < 0)), "below_eps": float(np.mean(below))}


def count(context: SelectionContext, selection: Selection) -> dict[str, Any]:
    """Rows before and after, by source and class; misclassified rows; reach of the cap and mean eps.

    Shares are of the kept rows. ``mislabelled_before`` and ``mislabelled_after`` are the shares of rows whose attack
    reaches beyond the margin (0 < margin < eps_i): of all rows at full eps, and of the kept rows at their own eps.
    ``reach`` is the share of kept rows with eps_i < eps. They are left out where margins are in another norm than the
    threat model, as is ``regime`` (see `regime`).
    """
    table, keep = context.table, selection.keep
    kept = int(np.count_nonzero(keep))
    margin = table.margin
    absent = np.isnan(margin)
    misclassified = margin < 0
    per_source = np.bincount(table.source[keep], minlength=len(table.sources))
    before = np.bincount(table.label, minlength=table.num_classes)
    after = np.bincount(table.label[keep], minlength=table.num_classes)
    counts: dict[str, Any] = {
        "rows": len(table),
        "prunable": len(context.quotas.order),
        "to_remove": int(context.quotas.remove.sum()),
        "removed": len(table) - kept,
        "kept": kept,
        "mean_eps": float(selection.eps.sum(dtype=np.float64) / kept) if kept else 0.0,
        "without_margin": int(np.count_nonzero(absent)),
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
        counts["regime"] = facts
        positive = margin > 0
        counts["mislabelled_before"] = float(np.mean(positive & (margin < np.float32(context.threat.eps))))
        counts["mislabelled_after"] = float(np.count_nonzero(positive & (margin < selection.eps))) / max(kept, 1)
        finite = keep & np.isfinite(margin)
        if finite.any():
            counts["mean_margin"] = float(margin[finite].mean(dtype=np.float64))
        if "c" in selection.derived:
            reach = margin < np.float32(context.threat.eps / selection.derived["c"])
            counts["reach"] = float(np.count_nonzero(reach & keep)) / max(kept, 1)
    return counts


def find_warnings(context: SelectionContext, selection: Selection, counts: dict[str, Any], rule: Strategy) -> list[str]:
    """Sentences about a plan that may not do what its maker expects, each with its numbers."""
    warnings = []
    rows, kept, absent = counts["rows"], counts["kept"], counts["without_margin"]
    if absent > NO_MARGIN_LIMIT * rows and absent < rows:
        warnings.append(
            f"{absent} of {rows} rows ({absent / rows:.1%}) have no margin: they are kept unless drawn, at full eps"
        )
    missing = counts["to_remove"] - counts["removed"]
    if missing > 0:
        warnings.append(f"{missing} rows fewer than asked could be removed: the others have no score")
    if rule.compares:
        used = selection.keep & (
            context.table.margin < np.float32(context.threat.eps / selection.derived.get("c", 1.0))
        )
        estimated = int(np.count_nonzero(used & (context.table.status == Status.ESTIMATED)))
        if estimated:
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
