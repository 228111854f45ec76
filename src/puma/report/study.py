"""The page of a study: verdict, one picture, one table; the rest is folded. Prose stands in its template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from puma._version import __version__
from puma.io import read_toml, sha256_file
from puma.plots import figure_style, new_axes, unit
from puma.report import plots
from puma.report.conclusion import robust_name, side, verdict
from puma.report.html import Picture, Report
from puma.report.run import Columns, read_curves, training_picture, training_table
from puma.report.selection import Plans, add_images, add_margins, add_plans, read_plans, rounded
from puma.report.study_data import ATTACKS, StudyData
from puma.report.tables import Kind, Table
from puma.tradeoff import (
    BASELINE,
    CONTROLS,
    Comparison,
    Estimate,
    Frontier,
    dominance,
    mean_interval,
    random_images_needed,
    read_runs,
    redundant,
    wilson_interval,
)
from puma.tradeoff.compare import RANDOM, Needed

NAMED = (BASELINE, "random", "difficult", "easy", "puma", "puma-plus")
"""Strategies that are named beside their points in the picture, and whose training is shown."""


def study_report(folder: Path | str) -> Report:
    """The report of a study's folder.

    Raises:
        DataError: there is no ``results.parquet``, or it is broken.
    """
    data = StudyData(Path(folder))
    report = Report("study.html.j2", f"{data.name}: accuracy against robustness")
    report.values = {"data": data, "verdict": verdict(data), "attack": ATTACKS[data.column], "redundant": []}
    if data.entries:
        _add_comparison(report, data)
        _add_axes(report, data)
    _add_mislabelled(report, data)
    _add_training(report, data)
    if data.table is not None:
        add_margins(report, data, data.table)
    plans = read_plans(data)
    add_plans(report, data, plans)
    add_images(report, data, plans)
    _add_repeat(report, data, plans)
    report.values["problems"] = data.problems
    return report


def tradeoff_picture(data: StudyData) -> Picture:
    """Clean against robust accuracy of every setting, with the lines of the free controls."""
    points, controls = _points(data)
    with figure_style():
        figure = plots.tradeoff_figure(points, controls, _axis_name(data))
    alt = "; ".join(
        f"{data.labels[entry.setting]}: robust {100 * data.accuracy(entry, 'robust').value:.1f} %, "
        f"clean {100 * data.accuracy(entry, 'clean').value:.1f} %"
        for entry in data.shown
    )
    return Picture(figure, f"Scatter plot of clean against robust accuracy. {alt}.")


def plot_study(folder: Path | str, ax: Axes | None = None) -> Axes:
    """Plot clean against robust accuracy of every setting of a study, with the lines of the free controls.

    Args:
        folder: the study's folder.
        ax: where to plot; None makes a new pyplot figure.

    Returns:
        the axes.

    Raises:
        DataError: there is no ``results.parquet``, or it is broken.
    """
    data = StudyData(Path(folder))
    axes, (points, controls) = ax or new_axes(), _points(data)
    plots.plot_tradeoff(axes, points, controls, _axis_name(data))
    for point in points:
        if point.label:
            at = 100 * point.robust.value, 100 * point.clean.value
            axes.annotate(point.label, at, (5, 3), textcoords="offset points", fontsize=7.5)
    return axes


def _points(data: StudyData) -> tuple[list[plots.Point], list[Frontier]]:
    """The settings of the main table and the free controls as points, the latter also as lines."""
    points = []
    for entry in [*data.shown, *(entry for entry in data.entries if entry.setting.strategy in CONTROLS)]:
        strategy, params = entry.setting.strategy, json.loads(entry.setting.params)
        name = data.labels[entry.setting].removesuffix(f" {100 * entry.setting.prune_fraction:g} %")
        label = name if strategy in NAMED or entry is data.subject else ""
        if strategy in CONTROLS and params:
            label = f"{'×' if strategy == 'uniform-eps' else 'β '}{next(iter(params.values())):g}"
        points.append(plots.Point(strategy, label, data.accuracy(entry, "robust"), data.accuracy(entry, "clean")))
    controls = []
    for control in data.controls:
        mine = [point for point in points if point.strategy in (control, BASELINE)]
        controls.append(Frontier(control, [p.robust.value for p in mine], [p.clean.value for p in mine]))
    return points, controls


def _axis_name(data: StudyData) -> str:
    return "robust accuracy" if data.column == "robust_accuracy" else f"accuracy {robust_name(data)}"


def _add_comparison(report: Report, data: StudyData) -> None:
    """The picture, the main table, every setting, gaps to the controls, dominance."""
    report.pictures["tradeoff"] = tradeoff_picture(data)
    name, subject = robust_name(data), data.subject
    report.values["strong"] = data.labels[subject.setting] if subject else None
    factor, words = unit(data.threat.norm) if data.threat else (1.0, "pixel units")
    columns: dict[str, Kind] = {
        "strategy": "text", "images": "number", f"mean eps ({words})": "number", "clean": "percent", name: "percent",
        **({"robust": "percent"} if data.standard else {}),
        "clean against none": "points", f"{name} against none": "points", "clean against free controls": "points",
    }  # fmt: skip

    def cells(entry: Comparison) -> list[Any]:
        accuracies: list[Estimate | None] = [data.accuracy(entry, "clean"), data.accuracy(entry, "robust")]
        if data.standard:
            strict = data.standard.find(entry.setting)
            accuracies.append(data.standard.accuracy(strict, "robust") if strict else None)
        changes = [entry.clean_difference, entry.robust_difference]
        eps = rounded(entry.mean_eps * factor)
        return [data.labels[entry.setting], round(entry.kept), eps, *accuracies, *changes, _gap_cell(data, entry)]

    shown = sorted(data.shown, key=lambda e: (e.setting.strategy != BASELINE, e is not subject, -_gap(e)))
    report.tables["strategies"] = Table(columns, [cells(entry) for entry in shown]).without_empty_columns()

    best = {entry.setting: entry for entry in data.best_entries}
    steps = {run.setting: int(run.steps) for run in read_runs(data.rows_of(data.entries[0].group), data.column)}
    more: dict[str, Kind] = {
        "seeds": "number", "clean, best checkpoint": "percent", f"{name}, best checkpoint": "percent",
        "attack cost (million passes)": "number", "steps": "number",
    }  # fmt: skip
    rows = []
    for entry in data.entries:
        twin = best.get(entry.setting)
        at_best = [twin.clean.value, twin.robust.value if twin.robust else None] if twin else [None, None]
        cost = None if np.isnan(entry.attack_cost) else rounded(entry.attack_cost / 1e6)
        rows.append([*cells(entry), len(entry.seeds), *at_best, cost, steps[entry.setting]])
    report.tables["settings"] = Table(columns | more, rows).without_empty_columns()

    columns = {
        "strategy": "text", f"clean at equal {name}": "points", "against the free controls": "text",
        f"{name} at equal clean": "points", "seeds compared": "text", "why not all": "text",
    }  # fmt: skip
    strategies = sorted((entry for entry in data.entries if not entry.setting.is_control), key=_gap, reverse=True)
    rows = []
    for entry in strategies:
        gap, gap_robust = entry.clean_gap, entry.robust_gap.estimate
        seeds = f"{gap.seeds} of {gap.of}"
        rows.append([data.labels[entry.setting], gap.estimate, side(gap), gap_robust, seeds, gap.note or None])
    if data.controls:
        report.tables["controls"] = Table(columns, rows).without_empty_columns()

    found = dominance([run for run in data.runs if run.group == data.main and np.isfinite(run.robust)])
    names = [data.labels[setting] for setting in found.settings]
    rows = []
    for j, label in enumerate(names):
        beaten = [other for i, other in enumerate(names) if found.by_mean[i, j]]
        always = [o for i, o in enumerate(names) if found.common[i, j] and found.seeds[i, j] == found.common[i, j]]
        rows.append([label, "no" if beaten else "yes", ", ".join(beaten) or None, ", ".join(always) or None])
    heads = ("strategy", "on the Pareto front", "beaten by, on average", "beaten by, at every common seed")
    report.tables["dominance"] = Table(dict.fromkeys(heads, "text"), rows)


def _gap(entry: Comparison) -> float:
    return -1.0 if entry.clean_gap.estimate is None else entry.clean_gap.estimate.value


def _gap_cell(data: StudyData, entry: Comparison) -> Estimate | str | None:
    """A gap where every seed could be compared: a mean over some is subject to selection bias."""
    gap = entry.clean_gap
    if entry.setting.is_control or not data.controls:
        return None
    if gap.estimate is None:
        return "not comparable"
    return gap.estimate if gap.seeds == gap.of else f"{gap.of - gap.seeds} of {gap.of} seeds not comparable"


def _add_axes(report: Report, data: StudyData) -> None:
    """Accuracies over the prune fraction and over the images trained on, where the study has several."""
    none = [entry for entry in data.entries if entry.setting.strategy == BASELINE]
    families = _families(data.entries, lambda entry: (entry.setting.strategy, entry.setting.params))
    curves = [sorted([*none, *g], key=lambda e: e.setting.prune_fraction) for g in families if len(g) > 1]
    if curves:
        xlabel = "prune fraction, % of the prunable images"
        picture = _curves(data, curves, lambda entry: 100 * entry.setting.prune_fraction, xlabel)
        report.pictures["prune-fraction"] = picture
    pools = {
        group: found
        for group, found in data.comparisons.items()
        if data.main and _axes_of(group) == _axes_of(data.main)
    }
    everywhere = [entry for found in pools.values() for entry in found if entry.setting.strategy not in CONTROLS]
    if len(pools) < 2:
        return
    families = _families(everywhere, lambda entry: entry.setting)
    curves = [sorted(group, key=lambda entry: entry.kept) for group in families if len(group) > 1]
    if curves:
        report.pictures["images"] = _curves(data, curves, lambda entry: entry.kept, "images trained on", log=True)
    strategies = {group[0].setting.strategy for group in curves} - set(RANDOM)
    rows = [row for group in pools for row in data.rows_of(group) if row.get(data.column) is not None]
    if needed := random_images_needed(rows, sorted(strategies), robust=data.column):
        report.tables["images-needed"] = _needed(data, needed)
    for entry in everywhere:
        if (
            entry.setting.strategy == "random"
            and redundant(entry.clean_difference)
            and redundant(entry.robust_difference)
        ):
            report.values["redundant"].append(f"On {entry.group.pool}, `{data.labels[entry.setting]}`")


def _axes_of(group: Any) -> tuple[str, str]:
    return group.recipe, group.checkpoint


def _families(entries: Iterable[Comparison], key: Callable[[Comparison], Any]) -> list[list[Comparison]]:
    groups: dict[Any, list[Comparison]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _curves(
    data: StudyData,
    groups: Sequence[Sequence[Comparison]],
    at: Callable[[Comparison], float],
    xlabel: str,
    log: bool = False,
) -> Picture:
    panels, parts = {}, []
    for title, axis in ((_axis_name(data), "robust"), ("clean accuracy", "clean")):
        panels[title] = [
            plots.Curve(group[-1].setting.strategy, [at(e) for e in group], [data.accuracy(e, axis) for e in group])
            for group in groups
        ]
    for curve in panels[_axis_name(data)]:
        ends = (f"{100 * curve.y[end].value:.1f} % at {curve.x[end]:g}" for end in (0, -1))
        parts.append(f"{curve.strategy}: {', '.join(ends)}")
    with figure_style():
        figure = plots.curves_figure(panels, xlabel, log)
    return Picture(figure, f"Curves of {' and '.join(panels)}. {robust_name(data)}: {'; '.join(parts)}.")


def _needed(data: StudyData, needed: Sequence[Needed]) -> Table:
    pairs: dict[tuple[str, int], dict[str, Needed]] = {}
    for need in needed:
        pairs.setdefault((data.labels[need.setting], data.pool_size(need.group)), {})[need.axis] = need
    rows = []
    for (label, pool), pair in sorted(pairs.items()):
        bounds = {axis: need.note.partition(": beyond")[0].partition(": before")[0] for axis, need in pair.items()}
        found = [need.images or bounds[axis] for axis, need in sorted(pair.items())]
        rows.append([label, pool, round(pair["clean"].kept), *found])
    columns: dict[str, Kind] = {
        "strategy": "text", "images in the pool": "number", "images trained on": "number",
        "random images for its clean accuracy": "number", "random images for its robust accuracy": "number",
    }  # fmt: skip
    return Table(columns, rows)


def _add_mislabelled(report: Report, data: StudyData) -> None:
    """Share of training images that a reference model gives another class once perturbed, but not before."""
    sample = data.settings.get("evaluation", {}).get("mislabelled", 2000)
    rows = []
    for setting in data.labels:
        run = data.first_runs.get(setting)
        if run and (shares := data.mislabelled.get((run.group.pool, run.group.recipe, setting))):
            share = mean_interval(shares)
            if len(shares) == 1:
                share = Estimate(share.value, *wilson_interval(share.value, int(min(sample, run.kept))), 1)
            rows.append((setting.strategy, data.labels[setting], share))
    if rows:
        with figure_style():
            figure = plots.dots_figure(rows, "training images mislabelled by the attack")
        alt = "; ".join(f"{label} {100 * share.value:.1f} %" for _, label, share in rows)
        report.pictures["mislabelled"] = Picture(figure, f"Mislabelled shares: {alt}.")
        columns: dict[str, Kind] = {"strategy": "text", "seeds": "number", "mislabelled": "percent"}
        report.tables["mislabelled"] = Table(columns, [[label, share.seeds, share] for _, label, share in rows])


def _add_training(report: Report, data: StudyData) -> None:
    """Training curves of the main strategies at their first seed."""
    curves: dict[str, Columns] = {}
    fractions = (0, data.subject.setting.prune_fraction if data.subject else 0)
    for setting, run in sorted(data.first_runs.items(), key=lambda item: item[0].strategy):
        folder = data.run_folder(run.key) if setting.strategy in NAMED and setting.prune_fraction in fractions else None
        if folder and (folder / "metrics.csv").is_file():
            curves[data.labels[setting]] = read_curves(folder / "metrics.csv")
    if picture := training_picture(curves):
        report.pictures["training"], report.tables["training"] = picture, training_table(curves)


def _add_repeat(report: Report, data: StudyData, plans: Plans) -> None:
    """Commands, settings, fingerprints and machines."""
    commits, versions = _recorded(data, "commit"), _recorded(data, "puma")
    if len(commits) == 1 and not commits[0].endswith("-dirty"):
        checkout = f"git checkout {commits[0]}"
    elif commits:
        checkout = "\n#   ".join(["# ran from, with uncommitted changes where it says dirty:", *commits])
    else:
        ran = f"ran with PUMA {', '.join(versions)}" if versions else f"this page was made by PUMA {__version__}"
        checkout = f"# the commit that ran was not recorded; {ran}"
    seen = {name: _recorded(data, name) for name in ("torch", "numpy")}
    pins = "".join(f"{name}=={found[0].partition('+')[0]} " for name, found in seen.items() if len(found) == 1)
    report.values["commands"] = (
        f"{checkout}\npip install {pins}.\npuma study run study.toml --out repeated/\npuma report repeated/"
    )
    report.values["toml"] = (data.folder / "study.toml").read_text() if data.settings else ""
    recipes = report.values["recipes"] = {}
    for run in data.runs:
        folder = data.run_folder(run.key)
        copies = [
            data.folder / "recipes" / f"{Path(run.group.recipe).stem}.toml",
            *([folder / "recipe.toml"] if folder else []),
        ]
        file = next((file for file in copies if file.is_file()), None)
        if file and run.group.recipe not in recipes:
            recipes[run.group.recipe] = read_toml(file)
    files = [data.folder / name for name in ("study.toml", "results.parquet")]
    prints = [(file.name, sha256_file(file)) for file in files if file.is_file()]
    if data.table is not None:
        prints += [("pool", data.table.meta["pool"]["fingerprint"]), ("margin table", data.table.fingerprint)]
        model = data.table.meta.get("model")
        several = (model.get("cross_fitted") or model.get("ensemble")) if isinstance(model, Mapping) else None
        for number, member in enumerate(several or [model], 1):
            sha256 = member.get("sha256") if isinstance(member, Mapping) else member
            prints += [(f"weights of margin model {number}", str(sha256))] if sha256 else []
    prints += [(f"plan: {data.labels[setting]}", plan.fingerprint) for setting, plan in plans.items()]
    heads: dict[str, Kind] = {"artefact": "text", "SHA-256": "text"}
    report.tables["fingerprints"] = Table(heads, [[name, f"`{value}`"] for name, value in prints])
    seconds = [float(record["seconds"]) for record in data.records.values() if "seconds" in record]
    machine = {name: _recorded(data, name) for name in ("host", "threads", "torch", "numpy", "puma")}
    hours = {"tasks": len(seconds), "hours, summed over tasks": f"{sum(seconds) / 3600:.2g}"}
    report.values["ran"] = {name: found for name, found in machine.items() if found} | hours if seconds else {}


def _recorded(data: StudyData, name: str) -> list[str]:
    """The values that finished tasks recorded under a name, each once."""
    return list(dict.fromkeys(str(record[name]) for record in data.records.values() if record.get(name)))
