"""``puma report``: the page of a study or a run, and its figures and tables as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A study's or a run's folder.", metavar="FOLDER")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; default report.html in the folder.", dir_okay=False)
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option("--export", metavar="FORMAT", help="svg, pdf, csv or latex; repeat it for several."),
    ] = None,
    export_out: Annotated[
        Path | None, typer.Option("--export-out", help="Where exported files go; default export/ in the folder.")
    ] = None,
) -> None:
    """Draw a study or a run: one self-contained page that opens without a network.

    A study's page holds the trade-off with the control frontiers, the gap of every strategy to them, margins, attack
    norms, images, training curves, and every setting needed to repeat it. Only results.parquet has to be there; all
    else in the folder adds its section. Of a study that still runs, the cells finished so far. A page that was made
    from more than is left in the folder is kept; --out writes another.

        puma report results/digits
        puma report results/digits --export pdf --export latex
    """
    from puma.report.export import check_formats
    from puma.report.export import export as write_files
    from puma.report.folder import make_report, write_page

    formats = check_formats(export or [])
    _refresh(folder)
    made = make_report(folder)
    typer.echo(write_page(made, folder, out))
    for path in write_files(made, formats, export_out or folder / "export") if formats else []:
        typer.echo(path)


def _refresh(folder: Path) -> None:
    """Write the results of a study that is still running anew, where more cells are finished than they hold."""
    if not ((folder / "study.toml").is_file() and (folder / "done").is_dir()):
        return
    import pyarrow.parquet as pq

    from puma.study.folder import StudyFolder
    from puma.study.results import collect, write_results

    study, path = StudyFolder.open(folder), folder / "results.parquet"
    finished = len(collect(study))
    if finished and (not path.is_file() or pq.read_metadata(path).num_rows < finished):
        write_results(study)
