"""The headline of a study: how far each strategy lies above what the control dials reach for nothing."""

from __future__ import annotations

from puma.report.content import Heading, Item, Note, Table
from puma.report.distributions import unit
from puma.report.page import Value
from puma.report.results import Arm
from puma.report.statistics import Compared, Statistics, verdict
from puma.threat import ThreatModel
from puma.tradeoff import Estimate, Gap

_CAPTION = (
    "Gap to the higher of the control frontiers, per seed, then averaged over the seeds that can be compared, with "
    "95 % intervals, not corrected for {count} made. Beyond what the controls reach there is no comparison."
)


def gap_items(statistics: Statistics, threat: ThreatModel | None) -> list[Item]:
    """Gaps to the higher control frontier: in words, as a table, and why seeds could not be compared."""
    if not statistics.controls:
        text = (
            "There is no control frontier (`uniform-eps`, `trades-weight`), so no strategy can be judged against one."
        )
        return [Note("warning", text)]
    if not statistics.judged:
        return []
    entries = sorted(statistics.judged, key=_headline, reverse=True)
    rows = [
        [
            entry.arm.label,
            signed(entry.found.clean_gap.estimate),
            verdict(entry.found.clean_gap) + _of_seeds(entry.found.clean_gap),
            signed(entry.found.robust_gap.estimate),
            *cost_cells(entry.arm, threat),
        ]
        for entry in entries
    ]
    head = ["strategy", "clean at equal robust", "against the controls", "robust at equal clean"]
    count = f"the {len(entries)} comparisons" if len(entries) > 1 else "the one comparison"
    names = [f"`{name}`" for name in statistics.controls]
    against = f"the higher of {' and '.join(names)}" if len(names) > 1 else names[0]
    return [
        Heading("Gap to what costs nothing"),
        f"Clean accuracy at equal robust accuracy, against {against}. {_sides(entries)}",
        Table("gap", [*head, *cost_head(threat)], rows, _CAPTION.format(count=count)),
        *_left_out(entries),
    ]


def signed(estimate: Estimate | None) -> Value:
    """A difference with its interval.

    >>> signed(Estimate(-0.0002, -0.01, 0.0096, 3)).text
    '0.000 [-0.010, +0.010]'
    """
    if estimate is None:
        return Value(None, "–")
    if estimate.low is None or estimate.high is None:
        return Value(estimate.value, _sign(estimate.value))
    text = f"{_sign(estimate.value)} [{_sign(estimate.low)}, {_sign(estimate.high)}]"
    return Value(estimate.value, text, estimate.low, estimate.high)


def cost_head(threat: ThreatModel | None) -> list[str]:
    """Heads of the columns that stand beside every figure: data, eps and compute are separate claims."""
    words = " × 255" if threat and threat.norm == "Linf" else ""
    return ["images kept", f"mean eps{words}", "attack cost, million passes"]


def cost_cells(arm: Arm, threat: ThreatModel | None) -> list[object]:
    """Images kept, mean eps and attack cost of an arm, means over seeds."""
    factor = unit(threat.norm)[0] if threat else 1.0
    kept, eps, cost = arm.mean("kept"), arm.mean("mean_eps"), arm.mean("attack_cost")
    return [
        None if kept is None else round(kept),
        None if eps is None else Value(eps * factor, f"{eps * factor:.1f}" if factor > 1 else f"{eps:.4g}"),
        None if cost is None else Value(cost / 1e6, f"{cost / 1e6:.3g}"),
    ]


def _sides(entries: list[Compared]) -> str:
    """Which strategies lie above, below, or neither."""
    sides: dict[str, list[str]] = {}
    for entry in entries:
        sides.setdefault(verdict(entry.found.clean_gap), []).append(entry.arm.label)
    return " ".join(f"{words.capitalize()}: {', '.join(labels)}." for words, labels in sides.items())


def _left_out(entries: list[Compared]) -> list[Item]:
    """Why some seeds could not be compared: such means are selected by their own outcome."""
    notes = [f"{entry.arm.label}: {entry.found.clean_gap.note}" for entry in entries if entry.found.clean_gap.note]
    if not notes:
        return []
    text = "Not all seeds could be compared; a mean over the others is selected by its own outcome. "
    return [Note("warning", text + "; ".join(notes) + ".")]


def _of_seeds(gap: Gap) -> str:
    """How many seeds could be compared, where not all or none could."""
    return f" ({gap.seeds} of {gap.of} seeds)" if 0 < gap.seeds < gap.of else ""


def _headline(entry: Compared) -> float:
    estimate = entry.found.clean_gap.estimate
    return float("-inf") if estimate is None else estimate.value


def _sign(value: float) -> str:
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text
