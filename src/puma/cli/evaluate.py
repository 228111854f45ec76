"""``puma evaluate``: clean and robust accuracy of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puma.cli.options import Config, Quiet, Seed, Threat
from puma.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from puma.data.source import Source
    from puma.evaluation import Evaluation


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Run folder, weights file, package.module:factory, or the name of a network.")
    ],
    data: Annotated[str, typer.Option("--data", help="Source of test images: digits:test, cifar10-test.parquet, ...")],
    threat: Threat,
    weights: Annotated[
        Path | None,
        typer.Option(help="For a factory or a name: safetensors weights, or the run folder that made them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of evaluation.json; a run folder keeps its own by default.")
    ] = None,
    attack: Annotated[
        str, typer.Option(help="standard (AutoAttack), clean, apgd-ce, pgd-20, cw-20, ce-cw-20.")
    ] = "standard",
    subset: Annotated[int | None, typer.Option(min=1, help="Attack a stratified subset of this many images.")] = None,
    checkpoint: Annotated[str, typer.Option(help="Of a run folder: both (last and best), last, or best.")] = "both",
    batch_size: Annotated[int, typer.Option(min=1, help="Images attacked together.")] = 256,
    shard_rows: Annotated[int, typer.Option(min=1, help="Images of a shard, the unit of sharing.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0 leaves it to torch.")] = 0,
    worker: Annotated[
        int | None, typer.Option(min=0, help="Number of this process (else torchrun's or SLURM's).")
    ] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Processes that share --out.")] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Start one worker for each of so many devices of this machine.")
    ] = 1,
    seed: Seed = 0,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model: clean accuracy on all test images, robust accuracy under AutoAttack standard.

    For a run folder both the model after the last step and the best checkpoint are evaluated; the difference is robust
    overfitting. AutoAttack costs about 10,000 forward passes for each image that withstands it: --subset 500 attacks
    500 images (their interval is about 4 points either way), and the output says so.

      puma evaluate runs/puma-30 --data digits:test --threat Linf:0.2

      puma evaluate my_package.nets:wide --weights runs/mine --data test.npz --threat Linf:8/255

    Interrupted or killed, the same command resumes; a finished evaluation is only printed. Several processes may share
    --out: --worker i --num-workers n, or torchrun, srun, or --devices n. Weaker attacks (--attack pgd-20) give upper
    bounds and are stored under their own names.
    """
    from puma.scoring.workers import place_from_environment, run_on_devices

    if (worker is None) != (num_workers is None):
        raise UsageError("--worker and --num-workers go together")
    if devices > 1 and worker is not None:
        raise UsageError("--devices numbers its workers itself", fix="leave out --worker and --num-workers")
    run = next(
        (Path(place) for place in (model, weights) if place and (Path(place) / "last.safetensors").is_file()), None
    )
    folder = out or run
    if devices > 1:
        if folder is None:
            raise UsageError("--devices needs a folder to share", fix="give --out")
        sys.exit(run_on_devices(sys.argv[1:], devices, _device(device)))
    if checkpoint not in ("both", "last", "best"):
        raise UsageError(f"unknown checkpoint {checkpoint!r}", fix="both, last or best")
    import torch

    from puma.data.load import load_dataset
    from puma.evaluation import evaluate as run_evaluation
    from puma.models.weights import weights_sha256

    if threads:
        torch.set_num_threads(threads)
    index, count, local = (worker, num_workers, 0) if worker is not None else place_from_environment()
    place = _device(device)
    if device == "auto" and local and place == "cuda":
        place = f"cuda:{local}"
    test = load_dataset(data)
    names = [checkpoint] if checkpoint != "both" else ["last", "best"]
    evaluated: dict[str, str] = {}
    for name in names if run else ["last"]:
        network = _model(model, weights, test, run and run / f"{name}.safetensors")
        same = evaluated.setdefault(weights_sha256(network), name)
        if same != name:  # without validation images the last model is the best one known
            typer.echo(f"{name}: the same weights as {same}, evaluated once")
            continue
        target = None if folder is None else folder / name if name == "best" else folder
        result = run_evaluation(
            network.to(place),
            test,
            threat,
            out=target,
            subset=subset,
            seed=seed,
            attack=attack,
            batch_size=batch_size,
            shard_rows=shard_rows,
            worker=index,
            num_workers=count or 1,
            progress=not quiet,
        )
        _print(result, name if run else model, target)


def _model(spec: str, weights: Path | None, test: Source, checkpoint: Path | None) -> nn.Module:
    """The model, or a run's ``checkpoint``; a bare name of a network takes its sizes from the test images."""
    from puma.models.zoo import resolve_model

    if weights is None:
        return resolve_model(checkpoint or spec)
    if ":" in spec:
        return resolve_model(spec, checkpoint or weights)
    height, _, channels = test.image_shape
    sizes = {"num_classes": test.num_classes, "in_channels": channels, "image_size": height}
    return resolve_model(spec, checkpoint or weights, **sizes)


def _device(device: str) -> str:
    from puma.devices import resolve_device

    return str(resolve_device(device))


def _print(result: Evaluation, name: str, folder: Path | None) -> None:
    typer.echo(f"{name}:")
    for line in result.describe().splitlines():
        typer.echo(f"  {line}")
    if result.apgd_accuracy is not None and result.attack == "standard":
        typer.echo(f"  after APGD-CE alone {result.apgd_accuracy:.2%}; cost {result.attack_cost:,} forward passes")
    for warning in result.warnings:
        typer.echo(f"  AutoAttack warns ({warning['flag']}): {warning['means']}")
        typer.echo(f"    what to do: {warning['do']}")
    if folder is not None and result.complete:
        stem = "evaluation" if result.attack == "standard" else f"evaluation-{result.attack}"
        typer.echo(f"  {folder / stem}.json, flags of every image in {stem}.parquet")
