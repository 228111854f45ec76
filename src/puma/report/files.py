"""Reports of study and run folders as pages, and their figures and tables as files."""

from __future__ import annotations

import io
import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.image import imread

from puma.errors import DataError, UsageError, unknown
from puma.io import atomic_path, prepare_folder, write_bytes, write_text
from puma.plots import GRID, figure_style
from puma.report.html import Report
from puma.report.run import run_report
from puma.report.study import study_report

logger = logging.getLogger("puma")

_A4 = (8.27, 11.69)
FORMATS = ("svg", "pdf", "csv", "latex")
FROM_LARGE_FILES = ("training", "margins", "eps", "overlap")
"""Tables of a study that need more of it than its small files."""


def make_report(folder: Path | str) -> Report:
    """The report of a study or run folder.

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


def write_report(folder: Path | str, out: Path | str | None = None, report: Report | None = None) -> Path:
    """Write the page of a study or run folder, by default as ``report.html`` in it.

    That default does not replace a page made from more: a study that was moved with its small files alone would lose
    what can no longer be drawn.

    Args:
        folder: the study or run.
        out: where the page goes.
        report: the folder's report, where it is already made.

    Returns:
        the page written, or the one that was kept.

    Raises:
        DataError: it is neither a study nor a run, or what lies in it is broken.
        StorageError: the page cannot be written.
    """
    report = report or make_report(folder)
    page = Path(folder) / "report.html"
    before = page.read_text(errors="replace") if out is None and "verdict" in report.values and page.is_file() else ""
    lost = [name for name in FROM_LARGE_FILES if name not in report.tables and f'data-name="{name}.csv"' in before]
    if lost:
        logger.warning(
            "%s is kept as it is: it shows %s, for which the files are no longer in %s; give --out to write another",
            page,
            ", ".join(lost),
            folder,
        )
        return page
    return report.write(page if out is None else out)


def export(report: Report, formats: Sequence[str], folder: Path | str) -> list[Path]:
    """Write every figure (``svg``, ``pdf``) or table (``csv``, ``latex``) of a report into ``folder``.

    Equal reports give equal bytes. CSV holds full precision and fractions; LaTeX the numbers as the page shows them, in
    a ``tabular`` that needs the package booktabs.

    Returns:
        the files, in order.

    Raises:
        UsageError: an unknown format.
        StorageError: the folder cannot be written.
    """
    check_formats(formats)
    folder = prepare_folder(folder)
    written = []
    for kind in dict.fromkeys(formats):
        for name, picture in report.pictures.items() if kind in ("svg", "pdf") else ():
            written.append(folder / f"{name}.{kind}")
            if kind == "svg":
                write_text(written[-1], picture.svg)
            else:
                buffer = io.BytesIO()
                with figure_style():
                    picture.figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
                write_bytes(written[-1], buffer.getvalue())
        for name, table in report.tables.items() if kind in ("csv", "latex") else ():
            written.append(folder / f"{name}.{'csv' if kind == 'csv' else 'tex'}")
            write_text(written[-1], table.csv() if kind == "csv" else table.latex())
    return written


def write_summary(report: Report, path: Path | str) -> Path:
    """Write a PDF of two pages: the verdict with the picture, and the table.

    Raises:
        UsageError: the report is not that of a study with attacked runs.
        StorageError: the file cannot be written.
    """
    if "tradeoff" not in report.pictures:
        raise UsageError("only a study with attacked runs has a summary", fix="leave --pdf away, or use --export pdf")
    verdict, table = report.values["verdict"], report.tables["strategies"]
    with figure_style(), atomic_path(path) as temporary, PdfPages(temporary, metadata={"CreationDate": None}) as pages:
        first = Figure(figsize=_A4)
        top = 0.95
        for size, text in ((9, report.title), (12, verdict.headline), *((9, s) for s in verdict.sentences[1:])):
            lines = textwrap.wrap(text.replace("`", ""), round(900 / size))
            first.text(0.08, top, "\n".join(lines), fontsize=size, va="top", weight="bold" if size == 12 else "normal")
            top -= (len(lines) * size * 1.25 + 7) / (72 * _A4[1])
        buffer = io.BytesIO()
        report.pictures["tradeoff"].figure.savefig(buffer, format="png", dpi=300)
        image = imread(io.BytesIO(buffer.getvalue()))
        height = min(0.84 * _A4[0] / _A4[1] * image.shape[0] / image.shape[1], top - 0.03)
        axes = first.add_axes((0.08, top - height, 0.84, height))
        axes.imshow(image)
        axes.axis("off")
        pages.savefig(first)
        second = Figure(figsize=_A4)
        axes = second.add_axes((0.05, 0.05, 0.9, 0.9))
        axes.axis("off")
        heads = [textwrap.fill(head, 14) for head in table.heads]
        drawn = axes.table(table.shown, colLabels=heads, loc="upper center", cellLoc="right", edges="horizontal")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(7)
        drawn.auto_set_column_width(range(len(heads)))
        for (row, _), cell in drawn.get_celld().items():
            cell.set_height(0.055 if row == 0 else 0.02)
            cell.set_edgecolor(GRID)
        pages.savefig(second)
    return Path(path)


def check_formats(formats: Sequence[str]) -> None:
    """Refuse unknown formats.

    Raises:
        UsageError: a format is none of `FORMATS`.
    """
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
