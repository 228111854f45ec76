"""``puma demo``: the whole way on real images. ``puma perceptron``: the linear task in which it can be computed."""

from __future__ import annotations

import time
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from typer import Option

from puma.cli.options import Config, DryRun, Jobs, Quiet
from puma.cli.output import duration, echo, print_table
from puma.io import prepare_folder
from puma.tasks import Workers
from puma.threat import parse_eps


def demo(
    out: Annotated[Path, Option(help="Folder for everything the demo makes.")] = Path("demo"),
    seeds: Annotated[int, Option(min=1, help="How many seeds each strategy is trained with.")] = 1,
    strategies: Annotated[str | None, Option(metavar="A,B,...", help="Only these: none,puma,random.")] = None,
    prune_fraction: Annotated[float, Option(min=0, max=0.99, help="Share of synthetic images to prune.")] = 0.6,
    eps: Annotated[str, Option(help="Eps of the Linf threat model: a number or a fraction.")] = "0.15",
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """See PUMA at work on real images, without network, in four minutes of two cores.

    On scikit-learn's digits (1,797 images of 8x8): trains a diffusion model and samples 10,000 synthetic images, trains
    a robust margin model, measures every image's margin with DeepFool, makes a plan for each strategy, trains each plan
    adversarially with the same recipe and the same number of steps, evaluates each network with AutoAttack, and writes
    OUT/report.html. Stop it at any time and run it again: it goes on, and repeats nothing that was finished.
    """
    from puma.cli.study import conclude, print_cost
    from puma.study.folder import StudyFolder
    from puma.study.runner import run_study
    from puma.study.spec import StudySpec

    started = time.monotonic()
    settings = tomllib.loads((files("puma.study") / "demo.toml").read_text())
    grid = settings["grid"][0]
    if strategies is not None:
        grid["strategies"] = [name.strip() for name in strategies.split(",") if name.strip()]
    grid["prune_fractions"], grid["seeds"] = [prune_fraction], list(range(seeds))
    settings["threat"] = f"Linf:{parse_eps(eps):g}"
    folder = StudyFolder.create(StudySpec.parse(settings, "puma demo"), out, write=not dry_run)
    if dry_run:
        return print_cost(folder, jobs)
    run_study(folder, Workers(jobs, gpus=1), show=not quiet)
    conclude(folder, True)
    echo(f"\ntook     {(time.monotonic() - started) / 60:.1f} min")


def perceptron(
    out: Annotated[Path, Option(help="Folder for the simulations and report.html.")] = Path("perceptron"),
    full: Annotated[bool, Option("--full", help="Finer grids, more seeds, more dimensions: minutes.")] = False,
    jobs: Jobs = 2,
    pictures: Annotated[Path | None, Option(help="Folder for the figures as SVG files; OUT if not given.")] = None,
    dry_run: DryRun = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """See why PUMA works, and when it cannot: students of a linear teacher, simulated and predicted, in a minute.

    Trains linear students to optimality on data pruned and attacked by each strategy, plots learning curves with the
    high-dimensional theory through the points, the collapse of pruning easy examples, its recovery by a smaller eps,
    and the trade-off against the free control (all data, smaller eps). Interrupted, the same command resumes.
    """
    from puma.perceptron.experiments import DEFAULT, FULL
    from puma.report.perceptron import run_experiments, write_page

    started, experiments = time.monotonic(), FULL if full else DEFAULT
    if dry_run:
        costs = [(one.name, *one.cost(out)) for one in experiments]
        rows = [(name, sets, found, duration(seconds / jobs)) for name, sets, found, seconds in costs]
        print_table(("experiment", "training sets", "finished", "left"), rows)
        return echo("without the theory's curves; nothing was written")
    for folder in (out, pictures):
        if folder is not None:
            prepare_folder(folder)
    results = run_experiments(experiments, out, workers=jobs, progress=not quiet)
    page = write_page(results, out, pictures)
    students = sum(len(table) for table in results.tables.values())
    echo(f"students {students:,}\nreport   {page}\ntook     {time.monotonic() - started:.0f} s")
