"""What a study's strategies chose from: margins of the pool, plans, thumbnails, quality of the synthetic images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.pool import Pool
from puma.margins import STATUS_NAMES, MarginTable
from puma.plan import Plan
from puma.plots import figure_style, unit
from puma.report import plots
from puma.report.html import ImageRow, Picture, Report
from puma.report.study_data import StudyData
from puma.report.tables import Kind, Table
from puma.tradeoff import Setting

Plans = Mapping[Setting, Plan]
"""The plan of each setting at its first seed, as far as it is there."""

_THUMBNAILS, _MOST_CLASSES = 12, 10


def read_plans(data: StudyData) -> dict[Setting, Plan]:
    """The plans of the main group."""
    plans = {setting: data.plan(data.first_runs[setting].key) for setting in data.labels if setting in data.first_runs}
    return {setting: plan for setting, plan in plans.items() if plan is not None}


def add_margins(report: Report, data: StudyData, table: MarginTable) -> None:
    """Margins of the pool by status and by class."""
    factor, words = unit(table.norm)
    names = data.pool.class_names if data.pool else [str(code) for code in range(table.num_classes)]
    rows = []
    for kind, of_kind in plots.image_kinds(table).items():
        for code, status in enumerate(STATUS_NAMES):
            of_status = of_kind & (table.status == code)
            if count := int(of_status.sum()):
                margins = table.margin[of_status & np.isfinite(table.margin)] * factor
                median = rounded(np.median(margins)) if len(margins) else None
                rows.append([kind, status, count, count / max(int(of_kind.sum()), 1), median])
    with figure_style():
        figure = plots.margin_figure(table, data.threat)
    report.pictures["margins"] = Picture(figure, f"Histogram of the margins of {len(table):,} images.")
    columns: dict[str, Kind] = {"images": "text", "status": "text", "count": "number", "share": "percent"}
    report.tables["margins"] = Table(columns | {f"median margin ({words})": "number"}, rows)
    rows = []
    for code, name in enumerate(names):
        margins = table.margin[(table.label == code) & np.isfinite(table.margin)] * factor
        if len(margins):
            quantiles = [rounded(value) for value in np.quantile(margins, (0.05, 0.5, 0.95))]
            rows.append([name, len(margins), float(np.mean(margins < 0)), *quantiles])
    columns = {"class": "text", "images": "number", "misclassified": "percent", "5 % lie below": "number"}
    report.tables["margins-by-class"] = Table(columns | {"median": "number", "5 % lie above": "number"}, rows)


def add_plans(report: Report, data: StudyData, plans: Plans) -> None:
    """Eps of the kept images, and how far strategies remove the same ones."""
    if not plans:
        return
    norm = next(iter(plans.values())).threat.norm
    factor, words = unit(norm)
    eps = {data.labels[setting]: (setting.strategy, plan.eps[plan.keep]) for setting, plan in plans.items()}
    varied = {label: entry for label, entry in eps.items() if len(np.unique(entry[1])) > 1}
    if varied:
        with figure_style():
            figure = plots.eps_figure(varied, norm)
        means = "; ".join(f"{label} mean {values.mean() * factor:.3g}" for label, (_, values) in varied.items())
        report.pictures["eps"] = Picture(figure, f"Histograms of eps over kept images, {words}: {means}.")
    kinds = plots.image_kinds(data.table) if data.table is not None else {}
    rows = []
    for setting, plan in plans.items():
        label, kept, full = data.labels[setting], plan.eps[plan.keep], plan.threat.eps
        at_full, clean = (
            float(np.mean(share)) if len(kept) else 0.0 for share in (kept >= full * (1 - 1e-6), kept == 0)
        )
        parts = [plan.eps[plan.keep & of_kind] for of_kind in kinds.values()]
        means_by_kind = [rounded(part.mean() * factor) if len(part) else None for part in parts]
        shares = [at_full, max(1 - at_full - clean, 0.0), clean]
        rows.append([label, plan.kept, rounded(plan.mean_eps * factor), *means_by_kind, *shares])
    columns: dict[str, Kind] = {"strategy": "text", "images": "number", f"mean eps ({words})": "number"}
    columns |= {f"mean on {kind}": "number" for kind in kinds}
    columns |= {"at full eps": "percent", "lowered": "percent", "trained clean (eps 0)": "percent"}
    report.tables["eps"] = Table(columns, rows)
    removed = {data.labels[setting]: ~plan.keep for setting, plan in plans.items() if not plan.keep.all()}
    if len(removed) > 1:
        rows = [[label, *((a & b).sum() / a.sum() for b in removed.values())] for label, a in removed.items()]
        columns = {"removed by": "text"}
        report.tables["overlap"] = Table(columns | dict.fromkeys(removed, "percent"), rows)


def add_images(report: Report, data: StudyData, plans: Plans) -> None:
    """Thumbnails: easiest and hardest of each class, what the subject removes and keeps, synthetic beside real."""
    pool, table = data.pool, data.table
    report.values |= {"extremes": [], "removed": [], "beside": []}
    if rows := quality_rows(data.quality):
        columns: dict[str, Kind] = {"measure": "text", "synthetic images": "number"}
        report.tables["synthetic-quality"] = Table(columns | {"real test images in their place": "number"}, rows)
    if pool is None or table is None:
        return
    names, finite = pool.class_names, np.isfinite(table.margin)
    classes = np.unique(np.linspace(0, len(names) - 1, _MOST_CLASSES).round().astype(int))
    for code in classes:
        order = _by_margin(table, (table.label == code) & finite)
        for words, chosen in (("highest margin", order[::-1]), ("lowest margin", order)):
            report.values["extremes"].append(_thumbnails(f"{names[code]}: {words}", pool, table, chosen[:_THUMBNAILS]))
    plan = plans.get(data.subject.setting) if data.subject else None
    if plan is not None and data.subject and not plan.keep.all():
        for words, which in (("removed", ~plan.keep), ("kept", plan.keep & table.synthetic)):
            order = _by_margin(table, which & finite)
            places = np.linspace(0, len(order) - 1, min(2 * _THUMBNAILS, len(order))).round().astype(int)
            label = f"{data.labels[data.subject.setting]}: {words}"
            report.values["removed"].append(_thumbnails(label, pool, table, order[places]))
    if pool.synthetic.any() and not pool.synthetic.all():
        for code in classes:
            for words, kind in (("real", ~pool.synthetic), ("synthetic", pool.synthetic)):
                chosen = np.flatnonzero(kind & (pool.labels == code))[:_THUMBNAILS]
                report.values["beside"].append(ImageRow(f"{names[code]}: {words}", list(pool.read(chosen))))


_MEASURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("label kept: accuracy of a classifier trained on real images", ("label_agreement",), ("real_accuracy",)),
    ("usefulness: accuracy on real test images of a classifier trained on these",
     ("synthetic_trained_accuracy",), ("real_accuracy",)),
    ("mean distance to the nearest training image",
     ("neighbor", "synthetic_to_train", "mean"), ("neighbor", "test_to_train", "mean")),
    ("least distance to a training image",
     ("neighbor", "synthetic_to_train", "least"), ("neighbor", "test_to_train", "least")),
    ("copies: share nearer to a training image than all but 1 % of test images", ("neighbor", "copies"), ()),
    ("coverage of the real images, mean over classes", ("coverage", "synthetic"), ("coverage", "test")),
    ("Frechet distance to the training images", ("frechet", "synthetic"), ("frechet", "test")),
)  # fmt: skip


def quality_rows(quality: Mapping[str, Any]) -> list[list[Any]]:
    """Measures of `puma.generation.quality` that are known: words, of the synthetic images, of real test images.

    >>> quality_rows({"label_agreement": 0.99, "real_accuracy": 0.98})
    [['label kept: accuracy of a classifier trained on real images', 0.99, 0.98]]
    """
    rows = [[words, _measure(quality, one), _measure(quality, two)] for words, one, two in _MEASURES]
    return [row for row in rows if row[1] is not None]


def _measure(quality: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    """The number at a path; the mean where there is one for each class."""
    value: Any = quality if path else None
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    numbers = [
        float(v) for v in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(v, int | float)
    ]
    return sum(numbers) / len(numbers) if numbers else None


def rounded(value: float) -> float:
    """The number with four significant digits."""
    return float(f"{value:.4g}")


def _by_margin(table: MarginTable, which: NDArray[np.bool_]) -> NDArray[np.int64]:
    rows = np.flatnonzero(which)
    return rows[np.argsort(table.margin[rows], kind="stable")]


def _thumbnails(label: str, pool: Pool, table: MarginTable, rows: NDArray[np.int64]) -> ImageRow:
    factor, _ = unit(table.norm)
    return ImageRow(label, list(pool.read(rows)), [f"{margin * factor:+.3g}" for margin in table.margin[rows]])
