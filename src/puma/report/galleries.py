"""The sections that show images: the easiest and the hardest, what strategies remove, synthetic next to real."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from puma.data.pool import Pool
from puma.margins import MarginTable
from puma.report.choices import Choice, overlap_items
from puma.report.content import Gallery, Heading, Item, Note, Section, Table
from puma.report.distributions import unit
from puma.report.page import ImageRow
from puma.report.quality import quality_rows

_PER_ROW = 14
_MOST_CLASSES = 10
_REMOVED = (
    "For each strategy a sample of what it removes and of the synthetic images it keeps, evenly spaced from the lowest "
    "margin to the highest, at the first seed."
)
_QUALITY = (
    "How good the synthetic images are. No single number tells a good generator, so that each stands beside what real "
    "images it never saw score in their place."
)


def extreme_rows(table: MarginTable, pool: Pool) -> list[ImageRow]:
    """The images of highest and of lowest margin of each class, ten classes at most."""
    names = pool.class_names
    classes = np.unique(np.linspace(0, len(names) - 1, _MOST_CLASSES).round().astype(int))
    rows = []
    for code in classes:
        known = np.flatnonzero((table.label == code) & np.isfinite(table.margin))
        order = known[np.argsort(table.margin[known], kind="stable")]
        for words, chosen in (("highest margin", order[::-1][:_PER_ROW]), ("lowest margin", order[:_PER_ROW])):
            rows.append(_image_row(f"{names[code]}: {words}", pool, table, chosen))
    return rows


def gallery_section(table: MarginTable, pool: Pool | None, choices: Sequence[Choice], reason: str) -> Section:
    """The images that go first and last, and what each strategy removes."""
    items: list[Item] = []
    if pool is None:
        items.append(Note("info", f"The images are not shown: {reason or 'they are not at hand'}."))
    else:
        _, words = unit(table.norm)
        caption = f"The easiest and the hardest images of each class; under each its margin ({words})."
        items.append(Gallery(extreme_rows(table, pool), caption))
        rows = []
        for labels, keep in _kept_sets(choices):
            rows += _removed_rows(labels, keep, table, pool)
        if rows:
            items += [Heading("What each strategy removes"), Gallery(rows, _REMOVED)]
    return Section("Images", [*items, *overlap_items(choices)])


def synthetic_section(pool: Pool | None, quality: dict[str, object]) -> Section:
    """Synthetic images next to real ones, with their measured quality."""
    items: list[Item] = []
    if pool is not None and pool.synthetic.any() and not pool.synthetic.all():
        rows = []
        for code in np.unique(np.linspace(0, pool.num_classes - 1, _MOST_CLASSES).round().astype(int)):
            for words, kind in (("real", ~pool.synthetic), ("synthetic", pool.synthetic)):
                chosen = np.flatnonzero(kind & (pool.labels == code))[:_PER_ROW]
                rows.append(ImageRow(f"{pool.class_names[code]}: {words}", list(pool.read(chosen))))
        items.append(Gallery(rows, "The first images of each class, not chosen."))
    if rows_of_quality := quality_rows(quality):
        head = ["measure", "synthetic images", "real test images in their place"]
        items.append(Table("synthetic-quality", head, rows_of_quality, _QUALITY))
    return Section("Synthetic images", items)


def _kept_sets(choices: Sequence[Choice]) -> list[tuple[str, NDArray[np.bool_]]]:
    """What is kept, each set once with the labels of all strategies that keep it; those that keep all are left out."""
    sets: dict[bytes, tuple[list[str], NDArray[np.bool_]]] = {}
    for choice in choices:
        if not choice.plan.keep.all():
            sets.setdefault(choice.plan.keep.tobytes(), ([], choice.plan.keep))[0].append(choice.label)
    return [(", ".join(labels), keep) for labels, keep in sets.values()]


def _removed_rows(labels: str, keep: NDArray[np.bool_], table: MarginTable, pool: Pool) -> list[ImageRow]:
    rows = []
    for words, which in (("removed", ~keep), ("kept", keep & table.synthetic)):
        known = np.flatnonzero(which & np.isfinite(table.margin))
        if len(known):
            order = known[np.argsort(table.margin[known], kind="stable")]
            places = np.linspace(0, len(order) - 1, min(_PER_ROW, len(order))).round().astype(int)
            rows.append(_image_row(f"{labels}: {words}", pool, table, order[places]))
    return rows


def _image_row(label: str, pool: Pool, table: MarginTable, rows: NDArray[np.int64]) -> ImageRow:
    factor, _ = unit(table.norm)
    return ImageRow(label, list(pool.read(rows)), [f"{margin * factor:+.3g}" for margin in table.margin[rows]])
