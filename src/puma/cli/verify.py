"""``puma verify``: check the files of a folder of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puma.cli.options import Quiet
from puma.cli.output import echo


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a margin table, run or study, or one file.")],
    quiet: Quiet = False,
) -> None:
    """Check the files of a result: checksums, and the fingerprints that say what each was made from. Reads only.

    Compares the checksums in the files (Parquet pages, .npz members, weights, evaluations), looks for missing, foreign
    and repeated parts of margin tables, and compares run and recipe, run and plan, evaluation and weights, plan and
    table. Lists every bad file; exit code 3 if there is one.
    """
    from puma.verify import verify as verify_folder

    result = verify_folder(folder, progress=not quiet)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(result.counts.items()))
    echo(f"read     {counts or 'nothing'}")
    for note in result.notes:
        echo(f"note     {note}")
    result.raise_problems()
    echo(f"verified {folder}: no problem")
