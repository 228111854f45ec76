"""A plan in words and numbers, for ``puma plan``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from puma.threat import format_eps

if TYPE_CHECKING:
    from puma.margins import MarginTable
    from puma.plan import Plan

BAR = 40
BINS = 12
MOST_CLASSES = 20

_BRIDGE = {
    "misclassified": ("share misclassified", "margin < 0"),
    "below_eps": ("share below eps", "0 < margin < eps: may be mislabelled at full strength"),
    "mislabelled_after_pruning": ("the same after pruning", "if the highest margins go and eps stays"),
    "c": ("suggested c", "keeps the mislabelled mass what it was (strategy puma-plus)"),
    "residual_mislabelled": ("mislabelled under this c", "predicted, of the kept images"),
    "safe_prune_fraction": ("safe prune fraction", "with the cap; beyond it misclassified images dominate"),
    "safe_prune_fraction_uncapped": ("safe prune fraction, no cap", "at full eps"),
    "collapse_margin": ("collapse margin", "mean margin - mean eps with the cap; at or below 0: collapse"),
    "collapse_margin_uncapped": ("collapse margin, no cap", "mean margin - eps"),
}


def summary(plan: Plan) -> str:
    """What is kept, at which eps it is attacked, and the regime: one line each."""
    counts, threat = plan.meta["counts"], plan.threat
    eps = f"mean eps {format_eps(plan.mean_eps, threat.norm)}"
    if threat.eps:
        eps += f" = {plan.mean_eps / threat.eps:.1%} of {threat}"
    if "reach" in counts:
        lowered, c = f"{counts['reach']:.1%}", f"{plan.meta['derived']['c']:.4g}"
        eps += f"; eps is lowered on {lowered} of the kept images, those of lowest margin (c = {c})"
    weight = "" if plan.beta is None else f"; TRADES weight {plan.beta:g}"
    removed = f"{counts['removed']:,} of {counts['prunable']:,} prunable removed"
    lines = [f"{plan.strategy}: {plan.kept:,} of {len(plan):,} images kept ({removed})", f"{eps}{weight}"]
    if facts := counts.get("regime"):
        lines.append(
            f"regime: the margin model misclassifies {facts['misclassified']:.1%} of all images, "
            f"{facts['below_eps']:.1%} have 0 < margin < eps"
        )
    return "\n".join(lines)


def explanation(plan: Plan, table: MarginTable) -> str:
    """Counts by source and class, shares before and after, histograms, and what the theory says."""
    counts = plan.meta["counts"]
    sections = [
        _lines("settings", ((name, value) for name, value in plan.meta["params"].items())),
        _kept("source", [(f"{s['name']} ({s['role']})", s["rows"], s["kept"]) for s in counts["by_source"]]),
        _classes(counts["by_class"]),
        _shares(counts),
        _histogram("eps of the kept images", plan.eps[plan.keep]),
        _margins(plan, table),
        _theory(plan, table),
        _lines("warnings", (("-", warning) for warning in plan.warnings)),
    ]
    return "\n".join(section for section in sections if section)


def _lines(title: str, pairs: Iterable[tuple[str, Any]]) -> str:
    rows = [f"  {name}  {value}" for name, value in pairs]
    return "\n".join([f"\n{title}", *rows]) if rows else ""


def _kept(title: str, rows: Sequence[tuple[str, int, int]]) -> str:
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"  {name:{width}}  {kept:>12,} of {total:>12,}  {kept / total:7.1%}" for name, total, kept in rows if total
    ]
    return "\n".join([f"\nkept by {title}", *lines])


def _classes(by_class: Sequence[dict[str, int]]) -> str:
    rows = [(str(label), row["rows"], row["kept"]) for label, row in enumerate(by_class)]
    if len(rows) <= MOST_CLASSES:
        return _kept("class", rows)
    shares = sorted((kept / total, name) for name, total, kept in rows if total)
    (low, least), (high, most) = shares[0], shares[-1]
    return f"\nkept by class\n  {len(rows)} classes, from {low:.1%} (class {least}) to {high:.1%} (class {most})"


def _shares(counts: dict[str, Any]) -> str:
    rows, kept = counts["rows"], max(counts["kept"], 1)
    lines = [
        ("misclassified by the margin model", counts["misclassified"] / rows, counts["misclassified_kept"] / kept),
        ("without a margin", counts["without_margin"] / rows, None),
        ("kept, but not attacked", None, counts["unattacked"] / kept),
    ]
    if "mislabelled_before" in counts:
        before, after = counts["mislabelled_before"], counts["mislabelled_after"]
        lines.insert(0, ("attack reaches beyond the margin (may mislabel)", before, after))
    text = [f"\n{'share of':48}{'all images':>12}{'kept images':>14}"]
    for name, *shares in lines:
        cells = ["" if share is None else f"{share:.1%}" for share in shares]
        text.append(f"  {name:46}{cells[0]:>12}{cells[1]:>14}")
    return "\n".join(text)


def _histogram(title: str, values: NDArray[np.float32], marked: NDArray[np.float32] | None = None) -> str:
    """Bars of ``values``; with ``marked`` the part of each bar that is removed is drawn light."""
    everything = values if marked is None else np.concatenate([values, marked])
    if not len(everything):
        return ""
    low, high = (float(np.quantile(everything, q)) for q in (0.001, 0.999))
    edges = np.linspace(low, high if high > low else low + 1e-6, BINS + 1)
    dark = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    light = np.zeros_like(dark) if marked is None else np.histogram(np.clip(marked, edges[0], edges[-1]), edges)[0]
    scale = BAR / max(int((dark + light).max()), 1)
    lines = [f"\n{title}"]
    for edge, a, b in zip(edges, dark, light, strict=False):
        whole = round((a + b) * scale)
        solid = min(round(a * scale), whole)
        lines.append(f"  from {edge:10.5f}  {a + b:>12,}  {'#' * solid}{'.' * (whole - solid)}".rstrip())
    return "\n".join(lines)


def _margins(plan: Plan, table: MarginTable) -> str:
    finite = np.isfinite(table.margin)
    kept, removed = table.margin[finite & plan.keep], table.margin[finite & ~plan.keep]
    return _histogram(f"margin in {table.norm} (# kept, . removed)", kept, removed)


def _theory(plan: Plan, table: MarginTable) -> str:
    """The linear task's quantities; only where margins are in the threat model's norm."""
    if table.norm != plan.threat.norm or not np.isfinite(table.margin).any():
        return ""
    from puma.perceptron import bridge

    facts = bridge(table.margin, plan.threat.eps, plan.kept / len(plan))
    lines = ["\ntheory of a linear two-class student (a compass, not a law)"]
    for key, (name, meaning) in _BRIDGE.items():
        lines.append(f"  {name:28} {facts[key]:10.4f}  {meaning}")
    return "\n".join(lines)
