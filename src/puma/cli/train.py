"""``puma train``: adversarial training on a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from puma.cli.options import Config, Quiet, Seed, Threat
from puma.errors import PumaError


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; run again with it, training goes on.")],
    threat: Threat,
    real: Annotated[list[str], typer.Option(help="Source of real images; may be given several times.")],
    synthetic: Annotated[
        list[str] | None, typer.Option(help="Source of synthetic images; may be given several times.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan of `puma plan`; without it, everything at full eps.")] = None,
    model: Annotated[str, typer.Option(help="small-cnn, wrn-D-K, preactresnet-18, or package.module:factory.")] = (
        "wrn-28-10"
    ),
    weights: Annotated[Path | None, typer.Option(help="Start from these weights (safetensors).")] = None,
    recipe: Annotated[str, typer.Option(help="A name of `puma recipe list`, or a TOML file.")] = "trades-edm",
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe.")
    ] = None,
    validation: Annotated[
        int | None, typer.Option(min=0, help="Real images held out to choose the best checkpoint.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")] = 1,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard's files too (needs tensorboard).")] = False,
    seed: Seed = 0,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Train a network adversarially on the images that a plan keeps, each with its own attack norm.

    The number of optimiser steps is the recipe's, whatever the size of the pool. OUT then holds recipe.toml,
    metrics.csv, last.safetensors and best.safetensors (averaged weights) and checkpoints. Stop it at any time (Ctrl-C,
    SIGTERM, a crash) and run it again: it goes on, and ends in the same weights.

      puma train --real digits --threat Linf:0.2 --model small-cnn --recipe digits --out runs/all

      puma train --real cifar10.parquet --synthetic 1m.npz --plan p.parquet --threat Linf:8/255 --devices 4 --out r

    On several machines: torchrun --nnodes ... -m puma train ... (without --devices).
    """
    import sys

    from puma.distribute import start_processes, started_processes

    if devices > 1 and started_processes() == 1:
        raise typer.Exit(start_processes(devices, ["-m", "puma", *sys.argv[1:]]))
    from puma.data.load import load_dataset
    from puma.data.pool import Pool
    from puma.models.zoo import resolve_model
    from puma.training.loop import train as train_model
    from puma.training.recipe import load_recipe, parse_changes

    leads = _leads()
    try:
        settings = load_recipe(recipe, **parse_changes(change or []))
        sources = [(spec, "real") for spec in real] + [(spec, "synthetic") for spec in synthetic or []]
        pool = Pool([load_dataset(spec) for spec, _ in sources], [role for _, role in sources])
        height, _, channels = pool.image_shape
        options: dict[str, Any] = {}
        if ":" not in model:
            options = {"num_classes": pool.num_classes, "in_channels": channels, "image_size": height, "seed": seed}
        run = train_model(
            resolve_model(model, weights, **options),
            pool,
            threat=threat,
            plan=plan,
            recipe=settings,
            out=out,
            seed=seed,
            validation=validation,
            progress=leads and not quiet,
            accelerator=accelerator,
            tensorboard=tensorboard,
        )
    except PumaError as error:
        if leads:
            raise
        raise typer.Exit(error.exit_code) from None  # one message is enough
    if leads:
        built = getattr(run.model, "config", None)  # what PUMA built, it can build again from the file
        _report(run.meta, out, f"{out}" if built else f"{model} --weights {out}", threat)


def _leads() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _report(meta: dict[str, Any], out: Path, judged: str, threat: object) -> None:
    typer.echo(f"steps    {meta['steps']:,} in {meta['seconds'] / 60:.1f} min")
    typer.echo(f"images   {meta['unique_images']:,} of {meta['trained_on']:,} seen, in {meta['draws']:,} draws")
    if meta["best_validation"] is not None:
        found = f"{meta['best_validation']:.4f} under PGD (CW) on {meta['validation_images']:,} held-out real images"
        typer.echo(f"best     step {meta['best_step']:,}: {found}")
    typer.echo(f"models   {out / 'last.safetensors'}, {out / 'best.safetensors'}")
    typer.echo(f"next     puma evaluate {judged} --data TEST --threat {threat}")
