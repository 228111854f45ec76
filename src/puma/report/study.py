"""The page of a study: verdict, one picture, one table; the rest is folded. Prose stands in its template."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from puma import __version__, tradeoff
from puma.errors import DataError
from puma.io import read_toml
from puma.margins import STATUS_NAMES, MarginTable
from puma.plan import Plan
from puma.plots import figure_style, new_axes, unit
from puma.report import plots
from puma.report.page import Kind, Picture, Report, Table, png_uri, rounded
from puma.report.run import run_report
from puma.report.study_data import StudyData, verdict
from puma.tradeoff import BASELINE, CONTROLS, Comparison, Estimate, Frontier, Gap, Setting

logger = logging.getLogger("puma")
NAMED = (BASELINE, "random", "difficult", "easy", "puma", "puma-plus")  # beside their points in the picture
FROM_LARGE_FILES = ("margins", "eps")  # tables that need more of a study than its small files
_THUMBNAILS = 20


def make_report(folder: Path | str) -> Report:
    """The report of a study or run folder; `DataError` if it is neither, or broken."""
    folder = Path(folder)
    if (folder / "results.parquet").is_file():
        return study_report(folder)
    if (folder / "metrics.csv").is_file():
        return run_report(folder)
    what = "has no results yet" if (folder / "study.toml").is_file() else "is neither a study nor a run"
    how = "`puma study run` and `puma train --out` make them; `puma study status` shows how far a study is"
    raise DataError(f"{folder} {what}", why="a study has results.parquet, a run has metrics.csv", fix=how)


def write_report(folder: Path | str, out: Path | str | None = None, report: Report | None = None) -> Path:
    """Write the page of a study or run folder, by default as ``report.html`` in it, and return its path.

    That default does not replace a page made from more, as where a study was moved with its small files alone.
    ``report`` is the folder's report, where it is already made. Errors: `make_report`'s, `StorageError`.
    """
    report, page = report or make_report(folder), Path(folder) / "report.html"
    before = page.read_text(errors="replace") if out is None and "verdict" in report.values and page.is_file() else ""
    lost = [name for name in FROM_LARGE_FILES if name not in report.tables and f'data-name="{name}.csv"' in before]
    if lost:
        kept = "%s is kept as it is: it shows %s, for which the files are no longer in %s; give --out to write another"
        logger.warning(kept, page, ", ".join(lost), folder)
        return page
    return report.write(page if out is None else out)


def study_report(folder: Path | str) -> Report:
    """The report of a study's folder; `DataError` without a readable ``results.parquet``."""
    data = StudyData(folder)
    report = Report("study.html.j2", f"{data.name}: accuracy against robustness")
    plans = {setting: data.plan(run.key) for setting, run in data.first_runs.items()}
    known = {setting: plan for setting in data.labels if (plan := plans.get(setting)) is not None}
    report.values = {"data": data, "verdict": verdict(data), "attack": data.attack}
    report.values["seeds"] = max((len(entry.seeds) for entry in data.entries), default=0)
    report.values["images_resampled"] = any(np.isfinite(entry.clean.image_error) for entry in data.entries)
    if data.entries:
        report.pictures["tradeoff"] = tradeoff_picture(data)
        _add_comparison(report, data)
        _add_curves(report, data)
    _add_mislabelled(report, data)
    if data.table is not None:
        _add_margins(report, data.table, data)
    if known:
        _add_eps(report, data, known)
    _add_images(report, data)
    _add_repeat(report, data)
    report.values["problems"] = data.problems
    return report


def tradeoff_picture(data: StudyData) -> Picture:
    """Clean accuracy against that under attack of every setting, with the lines of the free controls."""
    points, controls = _points(data)
    with figure_style():
        figure = plots.tradeoff_figure(points, controls, data.accuracy_name)
    alt = "; ".join(
        f"{data.labels[entry.setting]}: {data.robust_name} {100 * data.accuracy(entry, 'robust').value:.1f} %, "
        f"clean {100 * data.accuracy(entry, 'clean').value:.1f} %"
        for entry in data.shown
    )
    return Picture(figure, f"Scatter plot of clean against {data.accuracy_name}. {alt}.")


def plot_study(folder: Path | str, ax: Axes | None = None) -> Axes:
    """Plot `tradeoff_picture` into ``ax``, by default a new pyplot figure; return the axes."""
    data = StudyData(folder)
    axes, (points, controls) = ax or new_axes(), _points(data)
    plots.plot_tradeoff(axes, points, controls, data.accuracy_name)
    for point in points:
        at = 100 * point.robust.value, 100 * point.clean.value
        axes.annotate(point.label, at, (5, 3), textcoords="offset points", fontsize=7.5)
    return axes


def _points(data: StudyData) -> tuple[list[plots.Point], list[Frontier]]:
    """The settings of the main table and the free controls as points, the latter also as lines."""
    points = []
    for entry in [*data.shown, *(entry for entry in data.entries if entry.setting.strategy in CONTROLS)]:
        strategy, params = entry.setting.strategy, json.loads(entry.setting.params)
        label = data.name_of(entry.setting) if strategy in NAMED or entry is data.subject else ""
        if strategy in CONTROLS and params:
            label = f"{'×' if strategy == 'uniform-eps' else 'β '}{next(iter(params.values())):g}"
        points.append(plots.Point(strategy, label, data.accuracy(entry, "robust"), data.accuracy(entry, "clean")))
    controls = []
    for control in data.controls:
        mine = [point for point in points if point.strategy in (control, BASELINE)]
        controls.append(Frontier(control, [p.robust.value for p in mine], [p.clean.value for p in mine]))
    return points, controls


def _add_comparison(report: Report, data: StudyData) -> None:
    """The main table, and the table of every setting."""
    name, subject = data.robust_name, data.subject
    report.values["strong"] = data.name_of(subject.setting) if subject else None
    factor, words = unit(data.threat.norm) if data.threat else (1.0, "pixel units")
    columns: dict[str, Kind] = {
        "strategy": "text", "images": "number", f"mean eps ({words})": "number", "clean": "percent", name: "percent",
        **({"robust": "percent"} if data.standard else {}),
        "clean against none": "points", f"{name} against none": "points", "clean against free controls": "points",
    }  # fmt: skip

    def cells(entry: Comparison) -> list[Any]:
        accuracies: list[Estimate | None] = [data.accuracy(entry, "clean"), data.accuracy(entry, "robust")]
        if data.standard:
            strict = data.strict(entry.setting)
            accuracies.append(data.standard.accuracy(strict, "robust") if strict else None)
        changes = [entry.clean_difference, entry.robust_difference, gap_cell(entry, entry.clean_gap)]
        return [round(entry.kept), rounded(entry.mean_eps * factor), *accuracies, *changes]

    def gap_cell(entry: Comparison, gap: Gap) -> Estimate | str | None:
        """A gap where every seed could be compared: a mean over some is subject to selection bias."""
        if entry.setting.is_control or not data.controls:
            return None
        if gap.estimate is None:
            return "not comparable"
        return gap.estimate if gap.seeds == gap.of else f"{gap.of - gap.seeds} of {gap.of} seeds not comparable"

    def order(entry: Comparison) -> tuple[bool, bool, float]:
        gap = -1.0 if entry.clean_gap.estimate is None else entry.clean_gap.estimate.value
        return entry.setting.strategy != BASELINE, entry is not subject, -gap

    shown = [[data.name_of(entry.setting), *cells(entry)] for entry in sorted(data.shown, key=order)]
    report.tables["strategies"] = Table(columns, shown)
    more: dict[str, Kind] = {
        f"{name} against free controls": "points", "seeds": "number", "clean, best checkpoint": "percent",
        f"{name}, best checkpoint": "percent", "attack cost (million passes)": "number",
    }  # fmt: skip
    rows = []
    for entry in data.entries:
        best = data.at_best.get(entry.setting)
        at_best = [best.clean.value, best.robust.value if best.robust else None] if best else [None, None]
        cost = None if np.isnan(entry.attack_cost) else rounded(entry.attack_cost / 1e6)
        own = [gap_cell(entry, entry.robust_gap), len(entry.seeds), *at_best, cost]
        rows.append([data.labels[entry.setting], *cells(entry), *own])
    report.tables["settings"] = Table(columns | more, rows)


def _add_curves(report: Report, data: StudyData) -> None:
    """Accuracies over the prune fraction and over the images trained on, where the study has several."""

    def families(entries: Iterable[Comparison], key: Callable[[Comparison], Any]) -> list[list[Comparison]]:
        groups: dict[Any, list[Comparison]] = {}
        for entry in entries:
            groups.setdefault(key(entry), []).append(entry)
        return [group for group in groups.values() if len(group) > 1]

    none = [entry for entry in data.entries if entry.setting.strategy == BASELINE]
    groups = [[*none, *group] for group in families(data.entries, lambda e: (e.setting.strategy, e.setting.params))]
    if groups:
        xlabel = "prune fraction, % of the prunable images"
        report.pictures["prune-fraction"] = _curves(data, groups, lambda e: 100 * e.setting.prune_fraction, xlabel)
    same = data.main.recipe, data.main.checkpoint
    pools = [found for group, found in data.comparisons.items() if (group.recipe, group.checkpoint) == same]
    everywhere = [entry for found in pools for entry in found if entry.setting.strategy not in CONTROLS]
    groups = families(everywhere, lambda entry: entry.setting)
    if groups:
        report.pictures["images"] = _curves(data, groups, lambda e: e.kept, "images trained on", log=True)


def _curves(
    data: StudyData,
    groups: Sequence[Sequence[Comparison]],
    at: Callable[[Comparison], float],
    xlabel: str,
    log: bool = False,
) -> Picture:
    panels: dict[str, list[plots.Curve]] = {}
    for title, axis in ((data.accuracy_name, "robust"), ("clean accuracy", "clean")):
        for group in (sorted(group, key=at) for group in groups):
            curve = group[-1].setting.strategy, [at(e) for e in group], [data.accuracy(e, axis) for e in group]
            panels.setdefault(title, []).append(curve)
    with figure_style():
        figure = plots.curves_figure(panels, xlabel, log)
    return Picture(figure, f"Curves of {' and '.join(panels)} over {xlabel}; the numbers are in the tables.")


def _add_mislabelled(report: Report, data: StudyData) -> None:
    """Share of training images that a reference model gives another class once perturbed, but not before."""
    shares, mean = data.mislabelled(), tradeoff.mean_interval
    rows = [[label, len(shares[one]), mean(shares[one])] for one, label in data.labels.items() if one in shares]
    if rows:
        columns: dict[str, Kind] = {"strategy": "text", "seeds": "number", "mislabelled": "percent"}
        report.tables["mislabelled"] = Table(columns, rows)


def _add_margins(report: Report, table: MarginTable, data: StudyData) -> None:
    """Margins of the pool by status."""
    (factor, words), rows = unit(table.norm), []
    for kind, of_kind in plots.image_kinds(table).items():
        for code, status in enumerate(STATUS_NAMES):
            margins = table.margin[of_kind & (table.status == code)]
            if len(margins):
                finite = margins[np.isfinite(margins)] * factor
                median = rounded(np.median(finite)) if len(finite) else None
                rows.append([kind, status, len(margins), len(margins) / int(of_kind.sum()), median])
    with figure_style():
        figure = plots.margin_figure(table, data.threat)
    report.pictures["margins"] = Picture(figure, f"Histogram of the margins of {len(table):,} images.")
    columns: dict[str, Kind] = {"images": "text", "status": "text", "count": "number", "share": "percent"}
    report.tables["margins"] = Table(columns | {f"median margin ({words})": "number"}, rows)


def _add_eps(report: Report, data: StudyData, plans: Mapping[Setting, Plan]) -> None:
    """Eps of the kept images of each setting's first plan."""
    (factor, words), rows = unit(next(iter(plans.values())).threat.norm), []
    for setting, plan in plans.items():
        kept = plan.eps[plan.keep]
        full, clean = (float(np.mean(which)) for which in (kept >= plan.threat.eps * (1 - 1e-6), kept == 0))
        shares = [full, max(1 - full - clean, 0.0), clean]
        rows.append([data.labels[setting], plan.kept, rounded(plan.mean_eps * factor), *shares])
    columns: dict[str, Kind] = {"strategy": "text", "images": "number", f"mean eps ({words})": "number"}
    columns |= {"at full eps": "percent", "lowered": "percent", "trained clean (eps 0)": "percent"}
    report.tables["eps"] = Table(columns, rows)


def _add_images(report: Report, data: StudyData) -> None:
    """A few thumbnails from both ends of the margins; measured quality of the synthetic images."""
    pool, table = data.pool, data.table
    report.values |= {"gallery": [], "quality": data.records.get("synthetic", {}).get("quality")}
    if pool is None or table is None:
        return
    order = np.argsort(table.margin, kind="stable")
    order = order[np.isfinite(table.margin[order])]
    for label, chosen in (("lowest margin", order[:_THUMBNAILS]), ("highest margin", order[::-1][:_THUMBNAILS])):
        notes = (f"{margin * unit(table.norm)[0]:+.3g}" for margin in table.margin[chosen])
        report.values["gallery"].append((label, list(zip(map(png_uri, pool.read(chosen)), notes, strict=True))))


def _add_repeat(report: Report, data: StudyData) -> None:
    """Commands, settings, recipes and machines."""
    recorded = {
        name: list(dict.fromkeys(str(record[name]) for record in data.records.values() if record.get(name)))
        for name in ("commit", "puma", "host", "threads", "torch", "numpy")
    }
    commits = recorded.pop("commit")
    if len(commits) == 1 and not commits[0].endswith("-dirty"):
        checkout = f"git checkout {commits[0]}"
    elif commits:
        checkout = "\n#   ".join(["# ran from, with uncommitted changes where it says dirty:", *commits])
    else:
        checkout = f"# the commit that ran was not recorded; this page was made by PUMA {__version__}"
    seconds = [float(record["seconds"]) for record in data.records.values() if "seconds" in record]
    hours = {"tasks": len(seconds), "hours, summed over tasks": f"{sum(seconds) / 3600:.2g}"}
    run = "pip install .\npuma study run study.toml --out repeated/\npuma report repeated/"
    report.values |= {
        "commands": f"{checkout}\n{run}",
        "toml": (data.folder / "study.toml").read_text("utf-8") if data.settings else "",
        "recipes": {path.stem: read_toml(path) for path in sorted((data.folder / "recipes").glob("*.toml"))},
        "ran": {name: found for name, found in recorded.items() if found} | hours if seconds else {},
    }
