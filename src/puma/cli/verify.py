"""``puma verify``: whether a folder of results is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puma.cli.options import Quiet


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a margin table, run or study, or one file.")],
    quiet: Quiet = False,
) -> None:
    """Check that results are whole and were made from what they say; list every bad file. Reads only.

    Compares the checksums that files carry (Parquet pages, .npz members, weights), looks for missing, foreign and
    repeated parts of margin tables, and follows fingerprints: run and recipe, run and plan, evaluation and weights,
    plan and table. Exit code 3 if anything is wrong.
    """
    from puma.provenance import verify as verify_folder

    found = verify_folder(folder, progress=not quiet)
    whole = ", ".join(f"{count} {kind}" for kind, count in sorted(found.counts.items()))
    typer.echo(f"whole    {whole or 'nothing'}")
    for note in found.notes:
        typer.echo(f"note     {note}")
    found.raise_problems()
    typer.echo(f"verified {folder}: nothing is wrong")
