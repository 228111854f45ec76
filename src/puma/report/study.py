"""The report of a study: one page from its folder."""

from __future__ import annotations

from pathlib import Path

from puma.report.axes import mislabelled_section, pool_section, prune_section
from puma.report.choices import Choice, eps_section, margin_section
from puma.report.comparison import comparison_sections, main_arms, robust_column
from puma.report.content import Note, Report, Section
from puma.report.galleries import gallery_section, synthetic_section
from puma.report.materials import Materials
from puma.report.repeat import repeat_section
from puma.report.results import Arm
from puma.report.statistics import make_statistics
from puma.report.training import training_section

FROM_LARGE_FILES = ("Training", "Margins", "Attack norms", "Images")
"""Sections that need more of a study than its small files."""


def study_report(folder: Path | str) -> Report:
    """What the report of a study says, for a page or for export.

    Raises:
        DataError: there is no ``results.parquet``, or it is broken.
    """
    materials = Materials(Path(folder))
    main = main_arms(materials.results)
    statistics = make_statistics(materials, main, robust_column(materials.results))
    choices = _choices(materials, main)
    sections = comparison_sections(materials, main, statistics)
    if main:
        sections += [prune_section(statistics), pool_section(materials, main), mislabelled_section(materials, main)]
        sections.append(training_section(materials, main))
    if table := materials.table:
        pool = materials.pool
        names = pool.class_names if pool else [str(code) for code in range(table.num_classes)]
        reason = next((text.partition(": ")[2] for text in materials.problems if text.startswith("images")), "")
        sections.append(margin_section(table, materials.threat, names))
        sections.append(eps_section(choices, table, names))
        sections.append(gallery_section(table, pool, choices, reason))
    else:
        pool = None
        sections.append(eps_section(choices, None, []))
    sections.append(synthetic_section(pool, materials.quality))
    sections.append(repeat_section(materials, choices))
    if materials.problems:
        lines = [Note("warning", f"Left out, {problem}.") for problem in materials.problems]
        sections.append(Section("What could not be read", list(lines)))
    return Report(f"{materials.name}: accuracy against robustness", _subtitle(materials), sections)


def _choices(materials: Materials, chosen: list[Arm]) -> list[Choice]:
    """The plans of the main arms at their first seed, as far as they are there."""
    plans = [(arm, materials.plan(arm.first)) for arm in chosen]
    return [Choice(arm.label, arm.strategy, plan) for arm, plan in plans if plan is not None]


def _subtitle(materials: Materials) -> str:
    rows = materials.results
    if not rows:
        return "a study without results yet"
    runs = len({(row.pool, row.recipe, row.strategy, row.params, row.prune_fraction, row.seed) for row in rows})
    seeds = len({row.seed for row in rows})
    threat = f", judged at {materials.threat}" if materials.threat else ""
    return f"{runs} {'run' if runs == 1 else 'runs'}, {seeds} {'seed' if seeds == 1 else 'seeds'}{threat}"
