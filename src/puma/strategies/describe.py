"""What a plan amounts to in numbers, and what is doubtful about it."""

from __future__ import annotations

from typing import Any

import numpy as np

from puma.margins import Status
from puma.strategies.problem import Choice, Problem
from puma.strategies.quotas import make_quotas
from puma.strategies.registry import Strategy

NO_MARGIN_LIMIT = 0.01
"""Share of rows without a margin from which on a plan warns."""

COLLAPSE_SHARE = 0.4
"""Share of kept rows that the attack carries over the boundary from which on training may collapse."""


def count(problem: Problem, choice: Choice) -> dict[str, Any]:
    """Rows before and after, by source and class; misclassified rows; reach of the cap and mean eps.

    Shares are of the kept rows. ``mislabelled_before`` and ``mislabelled_after`` are the shares of rows whose attack
    reaches beyond the margin (0 < margin < eps_i): of all rows at full eps, and of the kept rows at their own eps.
    They and ``reach`` are left out where margins are in another norm than the threat model.
    """
    table, keep = problem.table, choice.keep
    kept = int(np.count_nonzero(keep))
    margin = table.margin
    absent = np.isnan(margin)
    misclassified = margin < 0
    per_source = np.bincount(table.source[keep], minlength=len(table.sources))
    before = np.bincount(table.label, minlength=table.num_classes)
    after = np.bincount(table.label[keep], minlength=table.num_classes)
    counts: dict[str, Any] = {
        "rows": len(table),
        "prunable": len(problem.quotas.order),
        "to_remove": int(problem.quotas.remove.sum()),
        "removed": len(table) - kept,
        "kept": kept,
        "mean_eps": float(choice.eps.sum(dtype=np.float64) / kept) if kept else 0.0,
        "without_margin": int(np.count_nonzero(absent)),
        "misclassified": int(np.count_nonzero(misclassified)),
        "misclassified_kept": int(np.count_nonzero(misclassified & keep)),
        "unattacked": int(np.count_nonzero(keep & (choice.eps == 0))),
        "by_source": [
            {"name": source["name"], "role": source["role"], "rows": source["rows"], "kept": int(number)}
            for source, number in zip(table.sources, per_source, strict=True)
        ],
        "by_class": [{"rows": int(a), "kept": int(b)} for a, b in zip(before, after, strict=True)],
    }
    if table.norm == problem.threat.norm and not absent.all():
        positive = margin > 0
        counts["mislabelled_before"] = float(np.mean(positive & (margin < np.float32(problem.threat.eps))))
        counts["mislabelled_after"] = float(np.count_nonzero(positive & (margin < choice.eps))) / max(kept, 1)
        finite = keep & np.isfinite(margin)
        if finite.any():
            counts["mean_margin"] = float(margin[finite].mean(dtype=np.float64))
        if "c" in choice.derived:
            reach = margin < np.float32(problem.threat.eps / choice.derived["c"])
            counts["reach"] = float(np.count_nonzero(reach & keep)) / max(kept, 1)
    return counts


def doubts(problem: Problem, choice: Choice, counts: dict[str, Any], rule: Strategy) -> list[str]:
    """Sentences about a plan that may not do what its maker expects, each with its numbers."""
    found = []
    rows, kept, absent = counts["rows"], counts["kept"], counts["without_margin"]
    if absent > NO_MARGIN_LIMIT * rows and absent < rows:
        found.append(
            f"{absent} of {rows} rows ({absent / rows:.1%}) have no margin: they are kept unless drawn, at full eps"
        )
    missing = counts["to_remove"] - counts["removed"]
    if missing > 0:
        found.append(f"{missing} rows fewer than asked could be removed: the others have no score")
    if rule.compares and problem.table.meta.get("mode") == "fast":
        found.append("the margins are linearised estimates (mode fast), which order images but do not measure them")
    if reasons := _beyond_cascade(problem, choice, counts, rule):
        found.append(
            "the margins were measured for another plan (mode cascade) and are estimates elsewhere: "
            + "; ".join(reasons)
        )
    share, eps, margin = counts.get("mislabelled_after", 0.0), counts["mean_eps"], counts.get("mean_margin", np.inf)
    if share > COLLAPSE_SHARE:
        found.append(
            f"training may collapse: the attack carries {share:.0%} of the kept images over the margin model's "
            f"boundary, and in the linear two-class task training fails when about half of them are (warned above "
            f"{COLLAPSE_SHARE:.0%}); cap the attack (puma), prune less, or lower eps"
        )
    if 0 < margin <= eps or (margin <= 0 and eps > 0):
        found.append(
            f"training may collapse: mean eps {eps:.4g} is not below the kept images' mean margin {margin:.4g} (the "
            "collapse law of the linear two-class task); cap the attack (puma), prune less, or lower eps"
        )
    if counts.get("reach", 0.0) > 0.95:
        found.append(
            f"the cap reaches {counts['reach']:.0%} of the {kept} kept images: that is little more than a smaller eps "
            "(compare with uniform-eps)"
        )
    return found


def _beyond_cascade(problem: Problem, choice: Choice, counts: dict[str, Any], rule: Strategy) -> list[str]:
    """Where a plan rests on margins that a cascade only estimated, because it was told of another plan."""
    table, threat = problem.table, problem.threat
    told = (table.meta.get("settings") or {}).get("cascade")
    if told is None:
        return []
    reasons = []
    if "high margin" in rule.prunes:
        cut = make_quotas(table, told["prune_fraction"], protect_real=True, class_balanced=True)
        mine = problem.quotas
        if not (np.array_equal(cut.codes, mine.codes) and np.array_equal(cut.remove, mine.remove)):
            share = counts["to_remove"] / max(counts["prunable"], 1)
            reasons.append(
                f"it prunes {share:.4g} of the prunable images, that one {told['prune_fraction']:g} of each source and "
                "class, and margins were measured near that cut"
            )
    if rule.prunes.startswith("low") and counts["misclassified"]:
        reasons.append("it removes low margins, and how far misclassified images lie beyond the boundary is estimated")
    c = choice.derived.get("c", choice.derived.get("puma_c"))
    if c is not None and table.norm == threat.norm:
        reach = max(threat.eps, float(choice.eps.max(initial=0))) / c  # beyond eps where a rule goes there
        guessed = choice.keep & (table.status == Status.ESTIMATED) & (table.margin < np.float32(reach))
        if number := int(np.count_nonzero(guessed)):
            reasons.append(
                f"its cap reaches margins below {reach:.4g}, that one's below {told['threat']['eps'] / told['c']:.4g}, "
                f"and {number} of the {counts['kept']} kept images in its reach were not measured"
            )
    return reasons
