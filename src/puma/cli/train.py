"""``puma train``: adversarial training on a plan; ``puma recipe``: its settings by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puma.cli.options import Config, Device, Devices, DryRun, ModelName, Quiet, RecipeName, Seed, Threat
from puma.errors import PumaError
from puma.threat import ThreatModel

if TYPE_CHECKING:
    from torch import nn

    from puma.data.pool import Pool
    from puma.training.recipe import Recipe

recipe_app = typer.Typer(help="Recipes: the frozen settings of training.", no_args_is_help=True)


@recipe_app.command("list")
def list_recipes() -> None:
    """List the packaged recipes, with where their settings come from."""
    from puma.training.recipe import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        typer.echo(f"{name:12} {recipe.objective}, {recipe.steps:,} steps of {recipe.batch_size}: {recipe.source}")


@recipe_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A name of `puma recipe list`, or a TOML file.")],
    plain: Annotated[bool, typer.Option("--plain", help="Without the explanations.")] = False,
) -> None:
    """Print every field of a recipe with its meaning, as TOML: save it, change it, and train with the file."""
    from puma.training.recipe import load_recipe

    typer.echo(load_recipe(name).to_toml(documented=not plain), nl=False)


@dataclass(frozen=True)
class _Training:
    """What to train, in values that another process can be given."""

    model: str
    weights: Path | None
    new_head: bool
    real: tuple[str, ...]
    synthetic: tuple[str, ...]
    plan: Path | None
    threat: ThreatModel
    recipe: str
    changes: tuple[str, ...]
    out: Path
    seed: int
    options: tuple[tuple[str, Any], ...]  # further arguments of `puma.training.loop.train`


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; run again with it, training goes on.")],
    threat: Threat,
    real: Annotated[list[str], typer.Option(help="Source of real images; may be given several times.")],
    synthetic: Annotated[
        list[str] | None, typer.Option(help="Source of synthetic images; may be given several times.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan of `puma plan`; without it, everything at full eps.")] = None,
    model: ModelName = "wrn-28-10",
    weights: Annotated[Path | None, typer.Option(help="Start from these weights (safetensors).")] = None,
    new_head: Annotated[
        bool, typer.Option("--new-head", help="With --weights: other classes, so the last layer starts anew.")
    ] = False,
    recipe: RecipeName = "trades-edm",
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe.")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(min=0, help="Real images held out to choose the best checkpoint.")
    ] = None,
    devices: Devices = 1,
    device: Device = "auto",
    logger: Annotated[
        str | None, typer.Option(help="tensorboard, wandb or mlflow: send the metrics there too.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start whatever the estimate of memory and time says.")] = False,
    dry_run: DryRun = False,
    seed: Seed = 0,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Train a network adversarially on the images that a plan keeps, each with its own eps.

    The number of optimiser steps is the recipe's, whatever the size of the pool. OUT then holds recipe.toml,
    metrics.csv, last.safetensors and best.safetensors (averaged weights) and checkpoints. Stop it at any time (Ctrl-C,
    SIGTERM, a crash) and run it again: it goes on, and ends in the same weights.

      puma train --real digits --threat Linf:0.2 --model small-cnn --recipe digits --out runs/all

      puma train --real cifar10.parquet --synthetic 1m.npz --plan p.parquet --threat Linf:8/255 --devices 4 --out r

    On several machines: torchrun --nnodes ... -m puma train ... (without --devices).
    """
    from puma.devices import world_size
    from puma.tasks import Workers, run_tasks, worker_from_environment

    options = {"validation": validation, "device": device, "logger": logger, "ignore_estimate": yes}
    sources, generated, changes = tuple(real), tuple(synthetic or ()), tuple(change or ())
    settings = tuple(options.items())
    job = _Training(model, weights, new_head, sources, generated, plan, threat, recipe, changes, out, seed, settings)
    if dry_run:
        typer.echo(_dry_run(job))
        return
    if devices > 1 and world_size() == 1:
        work = partial(_train, job, quiet)
        described = dict(run_tasks(work, range(devices), Workers(devices, ranks=True)))[0]
    else:
        rank = worker_from_environment()[0] if world_size() > 1 else 0
        try:
            described = _train(job, quiet, rank)
        except PumaError as error:
            if rank == 0:
                raise
            raise typer.Exit(error.exit_code) from None  # one message is enough
        if rank:
            return
    _report(described, out, f"{out}" if described["built_by_puma"] else f"{model} --weights {out}", threat)


def _train(job: _Training, quiet: bool, rank: int) -> dict[str, Any]:
    """Train as process ``rank`` of those that train together; return facts about the run."""
    from puma.training.loop import train as train_model

    model, pool, recipe = _materials(job)
    run = train_model(
        model,
        pool,
        threat=job.threat,
        plan=job.plan,
        recipe=recipe,
        out=job.out,
        seed=job.seed,
        progress=rank == 0 and not quiet,
        **dict(job.options),
    )
    return {**run.meta, "built_by_puma": bool(getattr(run.model, "config", None))}


def _materials(job: _Training) -> tuple[nn.Module, Pool, Recipe]:
    from puma.data.load import load_dataset
    from puma.data.pool import Pool
    from puma.models.zoo import resolve_model
    from puma.training.recipe import load_recipe, parse_changes

    recipe = load_recipe(job.recipe, **parse_changes(job.changes))
    roles = ["real"] * len(job.real) + ["synthetic"] * len(job.synthetic)
    pool = Pool([load_dataset(spec) for spec in (*job.real, *job.synthetic)], roles)
    height, _, channels = pool.image_shape
    sizes = {"num_classes": pool.num_classes, "in_channels": channels, "image_size": height, "seed": job.seed}
    return resolve_model(job.model, job.weights, new_head=job.new_head, **sizes), pool, recipe


def _dry_run(job: _Training) -> str:
    """What a training will cost here, once everything about it is checked; nothing is written."""
    from puma.devices import Devices
    from puma.training.loop import prepare
    from puma.training.run import require_logger

    model, pool, recipe = _materials(job)
    options = dict(job.options)
    require_logger(options["logger"], job.out)
    devices = Devices(recipe.precision, options["device"])
    ready = prepare(model, pool, job.threat, job.plan, recipe, job.seed, options["validation"], devices)
    cost, kept = ready.estimate(), ready.batches.sampler.kept
    lines = [
        f"images   {kept:,} of {len(pool):,}, {recipe.steps * recipe.batch_size:,} draws",
        f"device   {devices.device}; with --devices N a process does its share of each batch",
        f"cost     {cost}",
    ]
    return "\n".join(lines)


def _report(meta: dict[str, Any], out: Path, evaluated: str, threat: ThreatModel) -> None:
    typer.echo(f"steps    {meta['steps']:,} in {meta['seconds'] / 60:.1f} min")
    typer.echo(f"images   {meta['unique_images']:,} of {meta['trained_on']:,} seen, in {meta['draws']:,} draws")
    if meta["best_validation"] is not None:
        accuracy = f"{meta['best_validation']:.4f} under PGD (CW) on {meta['validation_images']:,} held-out real images"
        typer.echo(f"best     step {meta['best_step']:,}: {accuracy}")
    typer.echo(f"models   {out / 'last.safetensors'}, {out / 'best.safetensors'}")
    typer.echo(f"next     puma evaluate {evaluated} --data TEST --threat {threat}")
