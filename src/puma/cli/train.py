"""``puma train``: adversarial training on a plan; ``puma recipe``: its settings by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

import puma
from puma.cli.options import Config, Device, Devices, DryRun, ModelName, Quiet, RecipeName, Seed, Threat, completion
from puma.cli.output import echo
from puma.devices import world_size
from puma.errors import PumaError
from puma.tasks import Workers, run_tasks, worker_from_environment

if TYPE_CHECKING:
    from torch import nn

    from puma.training.recipe import Recipe

    _Work = Callable[[], tuple[nn.Module, puma.Pool]]

_LOGGER = "tensorboard, wandb or mlflow: send the metrics there too."
_LOGGERS = completion("tensorboard", "wandb", "mlflow")
_NAME = "A name of `puma recipe list`, or a TOML file."
recipe_app = typer.Typer(help="Recipes: the frozen settings of training.", no_args_is_help=True)


@recipe_app.command("list")
def list_recipes() -> None:
    """List the packaged recipes, with where their settings come from."""
    from puma.training.recipe import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        echo(f"{name:12} {recipe.objective}, {recipe.steps:,} steps of {recipe.batch_size}: {recipe.source}")


@recipe_app.command("show")
def show_recipe(
    name: Annotated[str, Argument(help=_NAME, autocompletion=completion("puma.training.recipe:recipe_names"))],
    plain: Annotated[bool, Option("--plain", help="Without the explanations.")] = False,
) -> None:
    """Print every field of a recipe with its meaning, as TOML: save it, change it, and train with the file."""
    from puma.training.recipe import load_recipe

    typer.echo(load_recipe(name).to_toml(documented=not plain), nl=False)


def train(
    out: Annotated[Path, Option(help="Folder of the run; run again with it, training goes on.")],
    threat: Threat,
    real: Annotated[list[str], Option(help="Source of real images; may be given several times.")],
    synthetic: Annotated[list[str] | None, Option(help="Source of synthetic images; several times too.")] = None,
    plan: Annotated[Path | None, Option(help="Plan of `puma plan`; without it, everything at full eps.")] = None,
    model: ModelName = "wrn-28-10",
    weights: Annotated[Path | None, Option(help="Weights to start from (safetensors; published: .pt too).")] = None,
    new_head: Annotated[bool, Option("--new-head", help="For weights of other classes: a new last layer.")] = False,
    recipe: RecipeName = "trades-edm",
    change: Annotated[list[str] | None, Option("--set", metavar="FIELD=VALUE", help="Change the recipe.")] = None,
    validation: Annotated[int | None, Option(min=0, help="Real images held out to choose the best checkpoint.")] = None,
    devices: Devices = 1,
    device: Device = "auto",
    logger: Annotated[str | None, Option(help=_LOGGER, autocompletion=_LOGGERS)] = None,
    yes: Annotated[bool, Option("--yes", help="Start whatever the estimate of memory and time says.")] = False,
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
    from puma.training.recipe import load_recipe, parse_changes

    chosen = load_recipe(recipe, **parse_changes(change or []))
    work = partial(_materials, real, synthetic or [], model, weights, new_head, seed)
    arguments: dict[str, Any] = {"threat": threat, "plan": plan, "recipe": chosen, "seed": seed, "device": device}
    arguments |= {"out": out, "validation": validation, "logger": logger, "ignore_estimate": yes}
    if dry_run:
        return _print_cost(*work(), **arguments)
    if devices > 1 and world_size() == 1:
        task = partial(_train, work, arguments, quiet)
        meta = dict(run_tasks(task, range(devices), Workers(devices, ranks=True)))[0]
    else:
        rank = worker_from_environment()[0] if world_size() > 1 else 0
        try:
            meta = _train(work, arguments, quiet, rank)
        except PumaError as error:
            if rank == 0:
                raise
            raise typer.Exit(error.exit_code) from None  # one message is enough
        if rank:
            return
    echo(f"steps    {meta['steps']:,} in {meta['seconds'] / 60:.1f} min")
    echo(f"images   {meta['unique_images']:,} of {meta['trained_on']:,} seen, in {meta['draws']:,} draws")
    if meta["best_validation"] is not None:
        accuracy = f"{meta['best_validation']:.4f} under PGD (CW) on {meta['validation_images']:,} held-out real images"
        echo(f"best     step {meta['best_step']:,}: {accuracy}")
    echo(f"models   {out / 'last.safetensors'}, {out / 'best.safetensors'}")
    evaluated = f"{out}" if meta["built_by_puma"] else f"{model} --weights {out}"
    echo(f"next     puma evaluate {evaluated} --data TEST --threat {threat}")


def _train(work: _Work, arguments: dict[str, Any], quiet: bool, rank: int) -> dict[str, Any]:
    """Train as process ``rank`` of those that train together; return facts about the run."""
    from puma.models.networks import config_of

    run = puma.train(*work(), progress=rank == 0 and not quiet, **arguments)
    return {**run.meta, "built_by_puma": bool(config_of(run.model))}


def _materials(
    real: list[str], synthetic: list[str], model: str, weights: Path | None, new_head: bool, seed: int
) -> tuple[nn.Module, puma.Pool]:
    """The network and the pool that the options name, made anew in each process that trains."""
    from puma.models.zoo import resolve_model

    roles = ["real"] * len(real) + ["synthetic"] * len(synthetic)
    pool = puma.Pool([puma.load_dataset(spec) for spec in (*real, *synthetic)], roles)
    height, _, channels = pool.image_shape
    sizes = {"num_classes": pool.num_classes, "in_channels": channels, "image_size": height, "seed": seed}
    return resolve_model(model, weights, new_head=new_head, **sizes), pool


def _print_cost(model: nn.Module, pool: puma.Pool, recipe: Recipe, **arguments: Any) -> None:
    """Print what a training will cost here, once everything about it is checked; nothing is written."""
    from puma.devices import Devices
    from puma.training.loop import prepare
    from puma.training.run import require_logger

    require_logger(arguments["logger"], arguments["out"])
    devices = Devices(recipe.precision, arguments["device"])
    threat, plan, seed, validation = (arguments[name] for name in ("threat", "plan", "seed", "validation"))
    ready = prepare(model, pool, threat, plan, recipe, seed, validation, devices)
    cost, kept = ready.estimate(), ready.batches.sampler.kept
    echo(f"images   {kept:,} of {len(pool):,}, {recipe.steps * recipe.batch_size:,} draws")
    echo(f"device   {devices.device}; with --devices N a process does its share of each batch")
    echo(f"cost     {cost}")
