"""The sections on margins, attack norms, and how far strategies remove the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puma.margins import STATUS_NAMES, MarginTable
from puma.plan import Plan
from puma.report.content import Heading, Item, Picture, Section, Table
from puma.report.distributions import Group, eps_histograms, groups, margin_histogram, margins_by_class, unit
from puma.report.figures import matrix
from puma.report.page import Value
from puma.report.style import BLUE, ORANGE, house_style
from puma.threat import ThreatModel

_MOST_CLASSES = 20
_STATUSES = (
    "Statuses. `unconverged`, `no-gradient` and `nan` have no margin: such images are never pruned by margin and keep "
    "the full eps."
)


@dataclass(frozen=True)
class Choice:
    """One arm's plan at its first seed."""

    label: str
    strategy: str
    plan: Plan

    @property
    def uniform(self) -> bool:
        """Whether all kept images have the same eps."""
        kept = self.plan.eps[self.plan.keep]
        return not len(kept) or bool(kept.min() == kept.max())


def margin_section(table: MarginTable, threat: ThreatModel | None, names: Sequence[str]) -> Section:
    """What the margin model says about the pool."""
    factor, words = unit(table.norm)
    rows = []
    for group in groups(table):
        for code, status in enumerate(STATUS_NAMES):
            of_status = group.rows & (table.status == code)
            if not (count := int(of_status.sum())):
                continue
            margins = table.margin[of_status & np.isfinite(table.margin)] * factor
            middle = float(np.median(margins)) if len(margins) else None
            rows.append([group.name, status, count, count / max(int(group.rows.sum()), 1), middle])
    with house_style():
        histogram, by_class = margin_histogram(table, threat), margins_by_class(table, names)
    wrong = float((table.status == STATUS_NAMES.index("misclassified")).mean()) if len(table) else 0.0
    counts = "; ".join(f"{group.name}: {int(group.rows.sum()):,}" for group in groups(table))
    return Section(
        "Margins",
        [
            f"The signed distance of every image of the pool to the decision boundary of the margin model, measured by "
            f"DeepFool in {table.norm}. Negative: the margin model gives the image another class than its label. "
            "Higher is easier, and is pruned first by `puma` and `easy`.",
            Picture(
                "margins",
                histogram,
                "Margins by kind of image and status. The outermost thousandth is counted in the end bins; images "
                "without a finite margin are in the table only.",
                f"Histogram of margins ({counts}); {wrong:.1%} of all images are misclassified by the margin model.",
            ),
            Table("margin-status", ["images", "status", "count", "share", f"median margin ({words})"], rows, _STATUSES),
            Picture(
                "margins-by-class",
                by_class,
                "Margins by class: median (dot), middle half (thick) and the range from 5 to 95 % (thin).",
                f"Ranges of the margin for each of {len(names)} classes.",
            ),
        ],
    )


def eps_section(choices: Sequence[Choice], table: MarginTable | None, names: Sequence[str]) -> Section:
    """Which attack norm each strategy gives to the images it keeps."""
    if not choices:
        return Section("Attack norms")
    norm = choices[0].plan.threat.norm
    factor, words = unit(norm)
    varied = [choice for choice in choices if not choice.uniform]
    items: list[Item] = [
        "How hard each kept image is attacked in training. A strategy that lowers eps everywhere is only a smaller "
        "eps: compare its mean with the `uniform-eps` control."
    ]
    if varied:
        with house_style():
            figure = eps_histograms({c.label: (c.strategy, c.plan.eps[c.plan.keep]) for c in varied}, norm)
        means = "; ".join(f"{c.label} mean {c.plan.mean_eps * factor:.3g}" for c in varied)
        caption = "Strategies with an attack norm of its own for each image; all others use one eps, see the table."
        items.append(Picture("eps", figure, caption, f"Histograms of eps over kept images, {words}: {means}."))
    kinds = groups(table) if table is not None else []
    rows = [_eps_row(choice, kinds, factor) for choice in choices]
    head = ["strategy", "kept", f"mean eps ({words})", *(f"mean on {kind.name}" for kind in kinds)]
    items.append(
        Table(
            "eps",
            [*head, "at full eps", "lowered", "trained clean (eps 0)"],
            rows,
            "Over kept images, at the first seed.",
        )
    )
    if varied and table is not None and len(names) <= _MOST_CLASSES:
        items.append(_eps_by_class(varied, table, names))
    return Section("Attack norms", items)


def _eps_row(choice: Choice, kinds: Sequence[Group], factor: float) -> list[object]:
    plan = choice.plan
    eps, full = plan.eps[plan.keep], plan.threat.eps
    count = max(len(eps), 1)
    at_full, clean = float((eps >= full * (1 - 1e-6)).sum() / count), float((eps == 0).sum() / count)
    parts = [plan.eps[plan.keep & kind.rows] for kind in kinds]
    means = [float(part.mean()) * factor if len(part) else None for part in parts]
    shares = [Value(share, f"{share:.1%}") for share in (at_full, max(1 - at_full - clean, 0.0), clean)]
    return [choice.label, plan.kept, plan.mean_eps * factor, *means, *shares]


def _eps_by_class(varied: Sequence[Choice], table: MarginTable, names: Sequence[str]) -> Picture:
    """Mean eps over kept images of each class, as a share of the full eps."""
    values = np.full((len(varied), len(names)), np.nan)
    for i, choice in enumerate(varied):
        for j in range(len(names)):
            eps = choice.plan.eps[choice.plan.keep & (table.label == j)]
            if len(eps):
                values[i, j] = float(eps.mean()) / choice.plan.threat.eps
    with house_style():
        figure = matrix(values, [choice.label for choice in varied], names, ORANGE)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return Picture(
        "eps-by-class",
        figure,
        "Mean eps by class, as a share of the full eps: which classes a strategy goes easy on.",
        f"Mean eps by strategy and class lies between {low:.2f} and {high:.2f} of the full eps.",
    )


def overlap_items(choices: Sequence[Choice]) -> list[Item]:
    """How far strategies remove the same images."""
    pruning = [choice for choice in choices if not choice.plan.keep.all()]
    if len(pruning) < 2:
        return []
    dropped = [~choice.plan.keep for choice in pruning]
    values = np.array([[(a & b).sum() / a.sum() for b in dropped] for a in dropped])
    labels = [choice.label for choice in pruning]
    with house_style():
        figure = matrix(values, labels, labels, BLUE)
    pairs = [(values[i, j], labels[i], labels[j]) for i in range(len(labels)) for j in range(i)]
    most, least = max(pairs), min(pairs)
    caption = (
        "Share of the images that the strategy of the row removes which the strategy of the column removes too. Two "
        "unrelated choices agree on the prune fraction."
    )
    alt = f"Most alike: {most[1]} and {most[2]} ({most[0]:.2f}); least: {least[1]} and {least[2]} ({least[0]:.2f})."
    rows = [[label, *map(float, line)] for label, line in zip(labels, values, strict=True)]
    table = Table("overlap", ["removed by", *labels], rows, "The same as numbers.")
    return [Heading("Do strategies remove the same images?"), Picture("overlap", figure, caption, alt), table]
