"""``puma perceptron``: the linear task in which PUMA's claims can be computed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from puma.cli.options import Config, DryRun, Jobs, Quiet
from puma.cli.output import duration, echo, print_table


def perceptron(
    out: Annotated[Path, typer.Option(help="Folder for the simulations and report.html.")] = Path("perceptron"),
    full: Annotated[bool, typer.Option("--full", help="Finer grids, more seeds, more dimensions: minutes.")] = False,
    jobs: Jobs = 2,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as SVG files; OUT if not given.")
    ] = None,
    dry_run: DryRun = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """See why PUMA works, and when it cannot: students of a linear teacher, simulated and predicted, in a minute.

    Trains linear students to optimality on data pruned and attacked by each strategy, plots learning curves with the
    high-dimensional theory through the points, the collapse of pruning easy examples, its recovery by a smaller eps,
    and the trade-off against the free control (all data, smaller eps). Interrupted, the same command resumes.
    """
    from puma.io import prepare_folder
    from puma.perceptron.experiments import DEFAULT, FULL
    from puma.report.perceptron import run_experiments, write_page

    if dry_run:
        costs = [(one.name, *one.cost(out)) for one in (FULL if full else DEFAULT)]
        rows = [(name, f"{sets:,}", f"{found:,}", duration(seconds)) for name, sets, found, seconds in costs]
        print_table(("experiment", "training sets", "finished", "left"), rows)
        memory = max(8 * max(one.alphas) * one.dimension**2 for one in (FULL if full else DEFAULT))
        left = sum(cost[3] for cost in costs)
        echo(f"time     about {duration(left / jobs)} with --jobs {jobs}, without the theory's curves")
        echo(f"memory   {memory / 1e6:,.0f} MB for the largest training set; nothing was written")
        return
    started = time.monotonic()
    for folder in (out, pictures):
        if folder is not None:
            prepare_folder(folder)
    results = run_experiments(FULL if full else DEFAULT, out, workers=jobs, progress=not quiet)
    page = write_page(results, out, pictures)
    students = sum(len(table) for table in results.tables.values())
    echo(f"students {students:,}\nreport   {page}\ntook     {time.monotonic() - started:.0f} s")
