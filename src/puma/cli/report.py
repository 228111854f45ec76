"""``puma report``: the page of a study or a run, and its figures and tables as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puma.cli.output import echo


def report(
    folder: Annotated[Path, typer.Argument(help="A study's or a run's folder.", metavar="FOLDER")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; default report.html in the folder.", dir_okay=False)
    ] = None,
    pdf: Annotated[
        Path | None, typer.Option("--pdf", help="Also a summary of two pages as PDF.", metavar="FILE", dir_okay=False)
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option("--export", metavar="FORMAT", help="svg, pdf, csv or latex; repeat it for several."),
    ] = None,
    export_out: Annotated[
        Path | None, typer.Option("--export-out", help="Where exported files go; default export/ in the folder.")
    ] = None,
) -> None:
    """Write the page of a study or a run: one self-contained HTML file, and the verdict of a study in the terminal.

    A study's page begins with the verdict, one picture and one table; the rest is folded. Only results.parquet has to
    be there; all else in the folder adds its part. Of a study that still runs it shows what is finished. A page that
    was made from more than is left in the folder is kept; --out writes another.

        puma report runs/digits
        puma report runs/digits --pdf summary.pdf --export csv --export latex
    """
    from puma.report import export as write_files
    from puma.report import make_report, write_report, write_summary
    from puma.report.page import check_formats

    check_formats(export or [])
    _refresh(folder)
    made = make_report(folder)
    if "verdict" in made.values:
        echo(f"{made.values['verdict']}\n")
    echo(write_report(folder, out, made))
    if pdf is not None:
        echo(write_summary(made, pdf))
    for path in write_files(made, export, export_out or folder / "export") if export else []:
        echo(path)


def _refresh(folder: Path) -> None:
    """Write results.parquet again where a study has finished more than it holds."""
    if not ((folder / "study.toml").is_file() and (folder / "done").is_dir()):
        return
    from puma.study.folder import StudyFolder, collect, write_results
    from puma.tradeoff.results import RESULTS, normal_params, read_results

    study, path = StudyFolder.open(folder), folder / "results.parquet"
    rows = [
        {name: row.get(name) for name in RESULTS.names} | {"params": normal_params(row["params"], path)}
        for row in collect(study)
    ]
    if rows and (not path.is_file() or read_results(path) != rows):
        write_results(study)
