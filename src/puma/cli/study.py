"""``puma study``: run a comparison, and see how far it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from puma.cli.options import Address, DryRun, Engine, Jobs, NumWorkers, Quiet, Worker, share_of
from puma.cli.output import duration, echo, print_table
from puma.devices import resolve_device
from puma.errors import UsageError

if TYPE_CHECKING:
    from puma.study.folder import StudyFolder

_STUDY = "A study's TOML file, or the folder of one begun before."
_TIME = "Checkpoint and stop after this long: 90s, 25m, 3h."

study_app = typer.Typer(help="Compare strategies: many runs with one frozen recipe.", no_args_is_help=True)


@study_app.command("run")
def run(
    study: Annotated[Path, Argument(metavar="FILE", help=_STUDY)],
    out: Annotated[Path | None, Option(help="Folder of the study.  [default: runs/NAME]")] = None,
    only: Annotated[str | None, Option(metavar="RUN", help="Only runs of this name, or pattern: 'puma-p40-*'.")] = None,
    jobs: Jobs = 1,
    time_budget: Annotated[str | None, Option(metavar="TIME", help=_TIME)] = None,
    engine: Engine = "local",
    address: Address = None,
    join: Annotated[bool, Option("--join", hidden=True, help="Work in this process; no results, no report.")] = False,
    worker: Worker = None,
    num_workers: NumWorkers = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Run a study to its end: images, margins, every run, results.parquet and report.html.

    Stop it in any way and run the same command again: nothing that was finished is repeated. Runs may be added to the
    file later. An example, complete:

    \b
      name = "digits"
      threat = "Linf:0.2"
      recipe = "digits"
      pool = { real = "digits:train", test = "digits:test", synthetic = 10000 }
      network = { name = "small-cnn" }
      evaluation = { subset = 400 }
      grid = [{ strategies = ["none", "puma"], prune_fractions = [0.6], seeds = [0, 1, 2] }]
    """
    from puma.study.folder import StudyFolder
    from puma.study.runner import run_study, time_limit, work
    from puma.study.spec import StudySpec

    share = share_of("auto", jobs, worker, num_workers, engine, address)
    seconds = parse_time(time_budget) if time_budget else None
    if study.is_dir():
        if only is not None:
            raise UsageError(f"{study} is the folder of a study", fix="give --only with the study's TOML file")
        folder = StudyFolder.open(study)
        folder.freeze_recipes(write=not dry_run)
    else:
        spec = StudySpec.read(study)
        place = out or Path("runs") / re.sub(r"[^A-Za-z0-9._-]+", "_", spec.name)
        if only is not None:
            spec = spec.only(only)
            if (there := place / "study.toml").exists() and StudySpec.read(there).runs() != spec.runs():
                raise UsageError(f"{place} holds other runs of this study", fix="choose another --out")
        folder = StudyFolder.create(spec, place, write=not dry_run)
    if dry_run:
        return print_cost(folder, max(jobs, num_workers or 1))
    with time_limit(seconds) as over:
        if join or num_workers is not None:
            work(folder, worker=worker or 0, num_workers=num_workers or 1, show=not quiet)
        else:
            run_study(folder, share.workers, show=not quiet)
    if over.is_set() or not (join or worker):
        conclude(folder, not over.is_set())


def print_cost(folder: StudyFolder, jobs: int) -> None:
    """Print what is left of a study and what it costs here; nothing is written."""
    import torch

    from puma.study.stages import study_cost

    cores = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // jobs)
    torch.set_num_threads(cores)  # those of each process: small networks are slower with more
    costs, memory = study_cost(folder)
    seconds = sum((tasks - finished) * each for _, tasks, finished, each, _ in costs)
    origin = ("measured", "recorded")
    rows = [(*counts, duration(each), origin[recorded]) for *counts, each, recorded in costs]
    echo(f"study    {folder.spec.name}: {len(folder.spec.runs())} runs, in {folder.path}")
    print_table(("task", "tasks", "finished", "each", "from"), rows)
    gpu = f" and {seconds / 3600:,.2f} GPU-hours" if resolve_device("auto").type == "cuda" else ""
    hours = f"{seconds / 3600 * cores:,.2f} core-hours{gpu}"
    echo(f"left     {hours}: about {duration(seconds / jobs)} with --jobs {jobs}; threads of a process: {cores}")
    echo(f"memory   about {memory / 2**30:.2g} GiB a process, to train")
    echo("attacks are counted as if every image withstood them; nothing was written")


def conclude(folder: StudyFolder, done: bool) -> None:
    """Write and print what came out of a finished study, or say how one that the time budget ended goes on."""
    from puma.report import make_report, write_report
    from puma.study.folder import write_results

    results, path = write_results(folder), folder.path
    if not done:
        how = f"`puma study run {path}` goes on from here, `puma report {path}` shows it so far"
        return echo(f"time budget spent; {how}", err=True)
    made = make_report(path)
    if (table := made.tables.get("strategies")) is not None:
        columns = [place for place, head in enumerate(table.heads) if " against " not in head]
        rows = [[row[place] for place in columns] for row in table.shown]
        print_table([table.heads[place] for place in columns], rows)
    echo(f"results  {results}\nreport   {write_report(path, report=made)}\n\n{made.values['verdict']}")


@study_app.command("status")
def status(folder: Annotated[Path, Argument(help="Folder of a study.")]) -> None:
    """Show the grid of a study by seed: what is finished, what runs, what waits, and how long it may still take."""
    from puma.study.folder import StudyFolder
    from puma.study.runner import StudyStatus, eps_warnings, grid

    study = StudyFolder.open(folder)
    lines, marks = grid(study), {"finished": "x", "evaluating": "/", "running": "o", "waiting": "."}
    seeds = sorted({seed for states in lines.values() for seed in states if seed is not None})
    rows = []
    for label, states in lines.items():
        cells = [marks.get(states.get(seed, ""), "") for seed in seeds]
        if None in states and seeds:
            cells[0] = marks[states[None]]
        rows.append((label, *cells))
    print_table(("task, strategy by seed", *map(str, seeds)), rows)
    echo("x finished, / being evaluated, o running, . waiting")
    running = sum(state == "running" for states in lines.values() for state in states.values())
    counter = StudyStatus(study, max(1, running))
    at_work = f"{running} running" if running else "no process is running"
    echo(f"{counter.done()} % finished: {counter.summary()}; {at_work}")
    for warning in eps_warnings(study):
        echo(f"warning: {warning}")


def parse_time(text: str) -> float:
    """Seconds in ``90s``, ``25m`` or ``3h``, or `UsageError`.

    >>> parse_time("25m")
    1500.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not found:
        raise UsageError(f"cannot read {text!r} as a time", fix="write 90s, 25m or 3h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
