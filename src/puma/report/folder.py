"""From a folder to its report: a study's or a run's, told apart by what lies in it."""

from __future__ import annotations

import logging
from pathlib import Path

from puma.errors import DataError
from puma.report.content import Report
from puma.report.run import run_report
from puma.report.study import FROM_LARGE_FILES, study_report

logger = logging.getLogger("puma")


def make_report(folder: Path | str) -> Report:
    """What the report of a study or run folder says.

    Raises:
        DataError: it is neither, or what lies in it is broken.
    """
    folder = Path(folder)
    if (folder / "results.parquet").is_file():
        return study_report(folder)
    if (folder / "metrics.csv").is_file():
        return run_report(folder)
    what = "has no results yet" if (folder / "study.toml").is_file() else "is neither a study nor a run"
    raise DataError(
        f"{folder} {what}",
        why="a study has results.parquet, a run has metrics.csv",
        fix="`puma study run` and `puma train --out` make them; `puma study status` shows how far a study is",
    )


def write_report(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a study or run folder and return its path.

    Args:
        folder: the study or run.
        out: where the page goes; default ``report.html`` in the folder.

    Raises:
        DataError: it is neither, or what lies in it is broken.
        StorageError: the page cannot be written.
    """
    return write_page(make_report(folder), folder, out)


def write_page(report: Report, folder: Path | str, out: Path | str | None = None) -> Path:
    """Write a report as a page, but not by default over one that was made from more: a study that was moved with its
    small files alone would lose what can no longer be drawn.

    Args:
        report: what the page says.
        folder: of the study or run.
        out: where it goes; default ``report.html`` in the folder.

    Returns:
        the page written, or the one that was kept.
    """
    page = Path(folder) / "report.html"
    if out is None and (lost := _lost(report, page)):
        logger.warning(
            "%s is kept as it is: it shows %s, for which the files are no longer in %s; give --out to write another",
            page,
            ", ".join(lost),
            folder,
        )
        return page
    return report.page().write(page if out is None else out)


def _lost(report: Report, page: Path) -> list[str]:
    """Sections of an earlier page whose files the report did not have."""
    before = page.read_text(errors="replace") if page.is_file() else ""
    now = {section.title for section in report.sections if section.items}
    return [title for title in FROM_LARGE_FILES if title not in now and f"<h2>{title}</h2>" in before]
