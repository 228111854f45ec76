"""``puma demo``: the whole way on real images, in minutes."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from puma.cli.options import Config, DryRun, Jobs, Quiet
from puma.cli.output import echo


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds each strategy is trained with.")] = 1,
    strategies: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Only these strategies, e.g. none,puma,random.")
    ] = None,
    prune_fraction: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of the synthetic images that is pruned.")
    ] = 0.6,
    eps: Annotated[str, typer.Option(help="Eps of the Linf threat model: a number or a fraction.")] = "0.15",
    jobs: Jobs = 2,
    dry_run: DryRun = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """See PUMA at work on real images, without network, in about eight minutes of CPU time.

    On scikit-learn's digits (1,797 images of 8x8): trains a diffusion model and samples 10,000 synthetic images, trains
    a robust margin model, measures every image's margin with DeepFool, makes a plan for each strategy, trains each plan
    adversarially with the same recipe and the same number of steps, evaluates each network with AutoAttack, and writes
    OUT/report.html. Stop it at any time and run it again: it goes on, and repeats nothing that was finished.
    """
    import tomllib

    from puma.cli.study import conclude, print_cost
    from puma.study.folder import StudyFolder
    from puma.study.runner import run_study
    from puma.study.spec import StudySpec
    from puma.tasks import Workers
    from puma.threat import parse_eps

    started = time.monotonic()
    settings = tomllib.loads((files("puma.study") / "demo.toml").read_text())
    grid = settings["grid"][0]
    if strategies is not None:
        grid["strategies"] = [name.strip() for name in strategies.split(",") if name.strip()]
    grid["prune_fractions"], grid["seeds"] = [prune_fraction], list(range(seeds))
    settings["threat"] = f"Linf:{parse_eps(eps):g}"
    folder = StudyFolder.create(StudySpec.parse(settings, "puma demo"), out, write=not dry_run)
    if dry_run:
        print_cost(folder, jobs)
        return
    conclude(folder, run_study(folder, Workers(jobs, gpus=1), show=not quiet))
    from puma.report import verdict

    echo(f"\n{verdict(out)}\n")
    echo(f"took     {(time.monotonic() - started) / 60:.1f} min")
