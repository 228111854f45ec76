"""The sections along an axis: prune fraction, images in the pool; and the mislabelled share of each strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from puma.report.cells import Value
from puma.report.comparison import NAMES, interval, robust_column
from puma.report.content import Heading, Item, Note, Picture, Section, Table
from puma.report.figures import Curve, Interval, accuracy_curves, share_dots
from puma.report.materials import Materials, pool_rows
from puma.report.results import Arm, Result, arms
from puma.report.statistics import Compared, Statistics, make_statistics
from puma.report.style import house_style
from puma.tradeoff import BASELINE, CONTROLS, mean_interval, random_images_needed, redundant, wilson_interval
from puma.tradeoff.needed import RANDOM, REDUNDANT, Needed

Family = tuple[str, str]

_MISLABELLED = (
    "An image that is attacked too hard crosses the true boundary: the network is then taught a wrong label. Kept "
    "images are perturbed as in training, with the eps of the plan, and judged by a model of another seed that scored "
    "nothing. Images it gets wrong unperturbed count too."
)
_REDUNDANT = (
    "On the pool {pool}, `random` at prune fraction {share:g} surely loses less than {loss:g} in both accuracies: the "
    "pool is redundant, and no saving of data can be shown on it."
)


def prune_section(statistics: Statistics) -> Section:
    """Accuracies over the prune fraction, where a strategy was run at more than one."""
    families = _families(statistics.arms, lambda entry: (entry.arm.strategy, entry.arm.first.params))
    families = {key: group for key, group in families.items() if len(group) > 1}
    if not families:
        return Section("Prune fraction")
    whole = [entry for entry in statistics.arms if entry.arm.strategy == BASELINE]
    curves = []
    for group in families.values():
        group = sorted([*whole, *group], key=lambda entry: entry.arm.first.prune_fraction)
        curves.append((group, [entry.arm.first.prune_fraction for entry in group]))
    picture = _picture(
        "prune-fraction", statistics.column, curves, "prune fraction: share of the prunable images removed"
    )
    text = "All runs take the same number of optimiser steps. At 0 all curves start from `none`."
    return Section("Prune fraction", [text, picture])


def pool_section(materials: Materials, main: Sequence[Arm]) -> Section:
    """Accuracies over the images trained on, where the study has pools of several sizes."""
    first = main[0].first
    rows = [row for row in materials.results if (row.recipe, row.checkpoint) == (first.recipe, first.checkpoint)]
    pools = list(dict.fromkeys(row.pool for row in rows))
    if len(pools) < 2:
        return Section("Less data")
    column = robust_column(rows)
    everywhere = [
        make_statistics(materials, arms([row for row in rows if row.pool == pool], first.checkpoint), column)
        for pool in pools
    ]
    entries = [entry for statistics in everywhere for entry in statistics.arms]
    families = _families(entries, lambda e: (e.arm.strategy, f"{e.arm.first.params} {e.arm.first.prune_fraction:g}"))
    curves = []
    for group in families.values():
        if len(group) > 1 and group[0].arm.strategy not in CONTROLS:
            group = sorted(group, key=_kept)
            curves.append((group, [_kept(entry) for entry in group]))
    if not curves:
        return Section("Less data")
    picture = _picture("images", column, curves, "images trained on", log=True)
    items: list[Item] = [
        "Images generated and scored, images trained on, and compute are three claims. This is the second: the pool "
        "was generated and scored in full, the strategies train on part of it.",
        picture,
        *_redundancy(everywhere, pools),
        *_needed_items(rows, families),
    ]
    return Section("Less data", items)


def mislabelled_section(materials: Materials, main: Sequence[Arm]) -> Section:
    """Share of kept training images whose perturbation an independent judge gives another class."""
    shares_of: dict[tuple[str, str, str, float], list[float]] = {}
    for row in materials.mislabelled:
        key = row["strategy"], row["pool"], row["recipe"], row["prune_fraction"]
        shares_of.setdefault(key, []).append(row["share"])
    looked = materials.settings.get("evaluation", {}).get("mislabelled", 2000)
    entries: list[tuple[str, str, Interval]] = []
    rows: list[list[object]] = []
    for arm in main:
        first = arm.first
        shares = shares_of.get((_cell_label(arm), first.pool, first.recipe, first.prune_fraction))
        if shares is None:
            continue
        estimate = mean_interval(shares)
        low, high = estimate.low, estimate.high
        if estimate.seeds == 1:
            low, high = wilson_interval(estimate.value, min(looked, arm.first.kept))
        entries.append((arm.strategy, arm.label, Interval(estimate.value, low, high)))
        shown = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        rows.append([arm.label, estimate.seeds, Value(estimate.value, f"{estimate.value:.3f}{shown}", low, high)])
    if not entries:
        return Section("Mislabelled perturbations")
    with house_style():
        figure = share_dots(entries, "share of perturbed training images that the judge gives another class")
    alt = "; ".join(f"{label} {share.value:.3f}" for _, label, share in entries)
    return Section(
        "Mislabelled perturbations",
        [
            _MISLABELLED,
            Picture("mislabelled", figure, "Lower is better. 95 % intervals.", f"Mislabelled shares: {alt}."),
            Table("mislabelled", ["strategy", "seeds", "mislabelled share"], rows, "The same as numbers."),
        ],
    )


def _picture(
    name: str, column: str, curves: Sequence[tuple[Sequence[Compared], Sequence[float]]], xlabel: str, log: bool = False
) -> Picture:
    def drawn(values: Callable[[Compared], Interval]) -> list[Curve]:
        return [
            Curve(group[-1].arm.strategy, group[-1].arm.strategy, x, [values(entry) for entry in group])
            for group, x in curves
        ]

    with house_style():
        robust, clean = drawn(lambda e: interval(e.robust)), drawn(lambda e: interval(e.clean))
        figure = accuracy_curves(robust, clean, NAMES[column], xlabel, log)
    ends = "; ".join(
        f"{group[-1].arm.strategy}: {group[0].robust.value:.3f} at {x[0]:g}, {group[-1].robust.value:.3f} at {x[-1]:g}"
        for group, x in curves
    )
    caption = f"Accuracies over {xlabel.partition(':')[0]}, means over seeds with 95 % intervals."
    return Picture(name, figure, caption, f"Curves of robust and clean accuracy. Robust: {ends}.")


def _redundancy(everywhere: Sequence[Statistics], pools: Sequence[str]) -> list[Item]:
    """Pools on which random pruning loses next to nothing: no saving of data can be shown on them."""
    items: list[Item] = []
    for pool, statistics in zip(pools, everywhere, strict=True):
        for entry in statistics.arms:
            lost = entry.found.clean_difference, entry.found.robust_difference
            if entry.arm.strategy == "random" and all(redundant(difference) for difference in lost):
                text = _REDUNDANT.format(pool=pool, share=entry.arm.first.prune_fraction, loss=REDUNDANT)
                items.append(Note("warning", text))
    return items


def _needed_items(rows: Sequence[Result], families: dict[Family, list[Compared]]) -> list[Item]:
    """How many random images reach what each strategy reaches, for the strategies on the axis."""
    column = robust_column(rows)
    on_axis = {name for (name, _), group in families.items() if len(group) > 1}
    found = random_images_needed([row.to_dict() for row in rows], sorted(on_axis - {*RANDOM, *CONTROLS}), robust=column)
    pairs: dict[tuple[str, str], dict[str, Needed]] = {}
    for need in found:
        pairs.setdefault((need.setting.label, need.group.pool), {})[need.axis] = need
    if not pairs:
        return []
    table: list[list[object]] = [
        [
            label,
            pool_rows(pool) or pool,
            round(pair["clean"].kept),
            *(_count(pair[axis]) for axis in ("clean", "robust")),
        ]
        for (label, pool), pair in sorted(pairs.items(), key=lambda item: (item[0][0], item[1]["clean"].kept))
    ]
    head = ["strategy", "images in the pool", "images trained on", "for its clean accuracy", "for its robust accuracy"]
    caption = (
        "How many random images equal a strategy: read off the learning curve of `random` and `none` over all pools, "
        "seed by seed; geometric means with 95 % intervals over seeds. Beyond the curve's ends only a bound is known, "
        "and one such seed leaves no mean."
    )
    return [Heading("Random images needed"), Table("needed", head, table, caption)]


def _count(need: Needed) -> Value:
    if need.images is None:
        return Value(None, need.note.partition(": beyond")[0].partition(": before")[0])
    low, high = need.images.low, need.images.high
    ends = "" if low is None or high is None else f" [{low:,.0f}, {high:,.0f}]"
    return Value(need.images.value, f"{need.images.value:,.0f}{ends}", low, high)


def _families(entries: Iterable[Compared], key: Callable[[Compared], Family]) -> dict[Family, list[Compared]]:
    groups: dict[Family, list[Compared]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def _kept(entry: Compared) -> float:
    return entry.arm.mean("kept") or 0.0


def _cell_label(arm: Arm) -> str:
    """The strategy with its parameters as a study names its cells, ``uniform-eps(scale=0.5)``."""
    inner = ", ".join(f"{name}={value}" for name, value in sorted(arm.first.parameters.items()))
    return f"{arm.strategy}({inner})" if inner else arm.strategy
