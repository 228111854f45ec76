"""From a folder to its report: a study's or a run's, told apart by what lies in it."""

from __future__ import annotations

from pathlib import Path

from puma.errors import DataError
from puma.report.content import Report
from puma.report.run import run_report
from puma.report.study import study_report


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
    return make_report(folder).page().write(Path(folder) / "report.html" if out is None else out)
