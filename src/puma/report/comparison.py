"""The sections that compare strategies: the trade-off, gaps to the controls, every arm, what dominates what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from puma import tradeoff
from puma.report.content import Item, Note, Picture, Section, Table
from puma.report.figures import Frontier, Interval, Point, tradeoff_picture
from puma.report.gaps import cost_cells, cost_head, gap_items, signed
from puma.report.materials import Materials, pool_rows
from puma.report.page import Value
from puma.report.results import Arm, Result, arms
from puma.report.statistics import DIALS, Statistics
from puma.report.style import house_style
from puma.tradeoff import BASELINE, Estimate, dominance, read_runs, wilson_interval

NAMES = {"robust_accuracy": "robust accuracy (AutoAttack standard)", "apgd_accuracy": "accuracy under APGD-CE"}

_TRADEOFF = (
    "Every arm of the study: {name} on {count:,} test images to the right, clean accuracy upwards, 95 % intervals (cut "
    "at the frame). Up and to the right is better. Hollow marks are controls; the lines join what each free dial "
    "reaches and no other setting of it beats, level beyond that as far as it was run. A strategy earns its keep only "
    "above both lines."
)


def main_arms(rows: Sequence[Result]) -> list[Arm]:
    """The arms that the report is about: those of the pool and recipe with most arms, larger pools before smaller."""
    checkpoint = "last" if any(row.checkpoint == "last" for row in rows) else "best"
    groups = Counter((row.pool, row.recipe) for row in rows if row.checkpoint == checkpoint)
    if not groups:
        return []
    pool, recipe = max(groups, key=lambda key: (groups[key], pool_rows(key[0]) or 0))
    return arms([row for row in rows if (row.pool, row.recipe) == (pool, recipe)], checkpoint)


def robust_column(rows: Sequence[Result]) -> str:
    """AutoAttack standard where any run has it, else APGD."""
    return "robust_accuracy" if any(row.robust_accuracy is not None for row in rows) else "apgd_accuracy"


def comparison_sections(materials: Materials, chosen: Sequence[Arm], statistics: Statistics) -> list[Section]:
    """The trade-off, the gaps, every arm; a note alone where there are no results.

    Args:
        materials: the study's folder.
        chosen: the main arms.
        statistics: theirs.
    """
    if not chosen:
        text = "No run of this study is finished yet. `puma study status` shows how far it is."
        return [Section("Result", [Note("info", text)])]
    if not statistics.arms:
        text = "No run was attacked, so there is no trade-off to show; clean accuracies are in the table."
        return [Section("Result", [Note("warning", text)]), _arms_section(materials, statistics, chosen)]
    items = [*_caveats(statistics), tradeoff_item(statistics), *gap_items(statistics, materials.threat)]
    return [
        Section("Result", items),
        _arms_section(materials, statistics, chosen),
        Section("Which beats which", [*_difference_items(statistics), *_dominance_items(statistics)]),
    ]


def tradeoff_item(statistics: Statistics) -> Picture:
    """The trade-off picture."""
    name = NAMES[statistics.column]
    points = [
        Point(_point_label(entry.arm), entry.arm.strategy, interval(entry.robust), interval(entry.clean))
        for entry in statistics.arms
    ]
    lines = [Frontier(line.name, *_reached(line)) for line in statistics.mean_frontiers()]
    with house_style():
        figure = tradeoff_picture(points, lines, name)
    caption = _TRADEOFF.format(name=name, count=statistics.arms[0].arm.first.n_test)
    alt = "; ".join(f"{p.label}: robust {p.robust.value:.3f}, clean {p.clean.value:.3f}" for p in points)
    return Picture("tradeoff", figure, caption, f"Scatter plot of clean against robust accuracy. {alt}.")


def _reached(dial: tradeoff.Frontier) -> tuple[list[float], list[float]]:
    """What a dial reaches, as gaps are taken to it: its undominated points, level beyond them as far as it was run."""
    robust, clean = (axis.tolist() for axis in dial.corners)
    return [float(dial.robust.min()), *robust, robust[-1]], [clean[0], *clean, float(dial.clean.min())]


def interval(estimate: Estimate) -> Interval:
    """An accuracy as figures take it, its interval cut to [0, 1]."""
    return Interval(estimate.value, *_ends(estimate))


def cell(estimate: Estimate | None) -> Value:
    """An accuracy as tables take it: sorted by its value, its interval cut to [0, 1]."""
    if estimate is None:
        return Value(None, "–")
    low, high = _ends(estimate)
    return Value(estimate.value, str(replace(estimate, low=low, high=high)), low, high)


def _ends(estimate: Estimate) -> tuple[float | None, float | None]:
    if estimate.low is None or estimate.high is None:
        return None, None
    return max(estimate.low, 0.0), min(estimate.high, 1.0)


def _caveats(statistics: Statistics) -> list[Item]:
    """What must be known before a figure is read."""
    first = statistics.arms[0].arm.first
    items: list[Item] = []
    if statistics.column != "robust_accuracy":
        text = "No run was judged by AutoAttack standard. The robust axis is APGD-CE, a weaker attack."
        items.append(Note("warning", text))
    low, high = wilson_interval(0.5, first.n_test)
    text = (
        f"Robust accuracy is measured on {first.n_test:,} test images: at 0.5, the 95 % interval over images alone is "
        f"{low:.3f} to {high:.3f}."
    )
    if statistics.one_seed:
        text += (
            " There is one seed: intervals show the choice of test images only, not how much a training differs from "
            "the next with another seed. Differences between arms may be luck of the seed."
        )
        return [*items, Note("warning", text)]
    seeds = sorted({len(entry.arm.rows) for entry in statistics.arms})
    text += f" Means are over {' or '.join(map(str, seeds))} seeds, with Student's t"
    text += (
        "; the variance of the shared test images is added by bootstrap, the same resample for all runs."
        if statistics.images
        else ". Flags of single images are not at hand for all runs: the choice of images is not in the intervals."
    )
    return [*items, Note("info", text)]


def _arms_section(materials: Materials, statistics: Statistics, chosen: Sequence[Arm]) -> Section:
    """Every arm with its accuracies at both checkpoints."""
    pool, recipe, checkpoint = chosen[0].first.pool, chosen[0].first.recipe, chosen[0].first.checkpoint
    same = [row for row in materials.results if (row.pool, row.recipe) == (pool, recipe)]
    best = {arm.label: arm for arm in arms(same, "best")} if checkpoint == "last" else {}
    attacked = {entry.arm.label: entry for entry in statistics.arms}
    rows = []
    for arm in chosen:
        entry, twin = attacked.get(arm.label), best.get(arm.label)
        clean = cell(entry.clean) if entry else _mean(arm, "clean_accuracy")
        row: list[object] = [arm.label, len(arm.rows), clean, cell(entry.robust if entry else None)]
        if best:
            row += [_mean(twin, "clean_accuracy"), _mean(twin, statistics.column)]
        rows.append([*row, *cost_cells(arm, materials.threat), arm.first.steps])
    head = ["strategy", "seeds", "clean accuracy", NAMES[statistics.column]]
    head += ["clean, best checkpoint", "robust, best checkpoint"] if best else []
    caption = f"Pool: {pool}; recipe: {recipe}; {checkpoint} checkpoint. Means over seeds, 95 % intervals."
    return Section("Every arm", [Table("arms", [*head, *cost_head(materials.threat), "steps"], rows, caption)])


def _mean(arm: Arm | None, column: str) -> Value | None:
    value = arm.mean(column) if arm else None
    return None if value is None else Value(value, f"{value:.3f}")


def _difference_items(statistics: Statistics) -> list[Item]:
    rows = [
        [entry.arm.label, signed(entry.found.clean_difference), signed(entry.found.robust_difference)]
        for entry in statistics.arms
        if entry.found.clean_difference is not None
    ]
    if not rows or (statistics.one_seed and not statistics.images):
        return []
    head = ["strategy", "clean accuracy", NAMES[statistics.column]]
    caption = f"Difference from `{BASELINE}` (all data, full eps), paired by seed and test image, with 95 % intervals."
    return [Table("difference", head, rows, caption)]


def _dominance_items(statistics: Statistics) -> list[Item]:
    runs = read_runs([row.to_dict() for entry in statistics.arms for row in entry.arm.rows], statistics.column)
    found = dominance(runs)
    labels = {entry.found.setting: entry.arm.label for entry in statistics.arms}
    rows = []
    for column, arm in enumerate(found.settings):
        beaten = [labels[other] for row, other in enumerate(found.settings) if found.by_mean[row, column]]
        always = [
            labels[other]
            for row, other in enumerate(found.settings)
            if found.common[row, column] and found.seeds[row, column] == found.common[row, column]
        ]
        rows.append([labels[arm], "no" if beaten else "yes", ", ".join(beaten) or "–", ", ".join(always) or "–"])
    head = ["strategy", "on the Pareto front", "beaten by, on average", "beaten by, at every common seed"]
    caption = "Pareto dominance: beaten by arms that are no worse in both accuracies and better in one."
    return [Table("dominance", head, rows, caption)]


def _point_label(arm: Arm) -> str:
    """Short, for the picture: the points of a dial by their setting alone, the line says which dial it is."""
    parameter = DIALS.get(arm.strategy)
    if parameter and parameter in arm.first.parameters:
        return f"{'eps ×' if arm.strategy == 'uniform-eps' else 'weight '}{arm.first.parameters[parameter]:g}"
    return arm.label
