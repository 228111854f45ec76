"""``puma evaluate``: clean and robust accuracy of a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import puma
from puma.cli import options
from puma.cli.options import Config, Device, Devices, DryRun, NumWorkers, Quiet, Seed, Threat, Worker
from puma.cli.output import duration, echo
from puma.errors import UsageError
from puma.tasks import run_tasks

if TYPE_CHECKING:
    from torch import nn

    from puma.data.source import Source
    from puma.evaluation import Evaluation

    _Networks = dict[str, tuple[str, Path | None]]  # by checkpoint: what `resolve_model` takes

_MODEL = "Run folder, weights file, network by name, robustbench:, timm:, torchvision: or hf:NAME, or module:factory."
_WEIGHTS = "For a factory or a name: safetensors (published models: .pt too), or the run folder that made them."
_ATTACK = "standard (AutoAttack), clean, apgd-ce, pgd-20, cw-20."
_ATTACKS = options.completion("standard", "clean", "apgd-ce", "pgd-20", "cw-20")
_CHECKPOINT = "Of a run folder: both (last and best), last, or best."
_CHECKPOINTS = options.completion("both", "last", "best")
_OUT = "Folder of evaluation.json; a run folder keeps its own by default."


def evaluate(
    model: Annotated[str, Argument(help=_MODEL)],
    data: Annotated[str, Option("--data", help="Source of test images: digits:test, cifar10-test.parquet, ...")],
    threat: Threat,
    weights: Annotated[Path | None, Option(help=_WEIGHTS)] = None,
    out: Annotated[Path | None, Option(help=_OUT)] = None,
    attack: Annotated[str, Option(help=_ATTACK, autocompletion=_ATTACKS)] = "standard",
    subset: Annotated[int | None, Option(min=1, help="Attack a stratified subset of this many images.")] = None,
    checkpoint: Annotated[str, Option(help=_CHECKPOINT, autocompletion=_CHECKPOINTS)] = "both",
    batch_size: Annotated[int, Option(min=1, help="Images attacked together.")] = 256,
    shard_rows: Annotated[int, Option(min=1, help="Images of a shard, the unit of sharing.")] = 1024,
    device: Device = "auto",
    devices: Devices = 1,
    worker: Worker = None,
    num_workers: NumWorkers = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
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
    if checkpoint not in ("both", "last", "best"):
        raise UsageError(f"unknown checkpoint {checkpoint!r}", fix="both, last or best")
    share = options.share_of(device, devices, worker, num_workers)
    run = next((path for path in [Path(weights or model)] if (path / "last.safetensors").is_file()), None)
    folder = out or run
    if devices > 1 and folder is None:
        raise UsageError("--devices needs a folder to share", fix="give --out")
    arguments = {"subset": subset, "seed": seed, "attack": attack, "batch_size": batch_size, "shard_rows": shard_rows}
    names = (("last", "best") if checkpoint == "both" else (checkpoint,)) if run else (model,)
    files = {name: run / f"{name}.safetensors" if run else weights for name in names}
    networks = {name: (str(file or model), None) if weights is None else (model, file) for name, file in files.items()}
    if dry_run:
        return _print_cost(networks, data, share.device, arguments, max(devices, share.num_workers))
    work = partial(
        _evaluate, networks, data, folder, share.device, arguments | {"threat": threat, "progress": not quiet}
    )
    if devices > 1:
        for _ in run_tasks(partial(work, devices), range(devices), share.workers):
            pass  # the results lie in the shared folder
    for name, result in work(share.num_workers, share.worker).items():
        if isinstance(result, str):
            echo(f"{name}: the same weights as {result}, evaluated once")
        else:
            _print(result, name)


def _evaluate(
    networks: _Networks, data: str, out: Path | None, device: str, options: dict[str, Any], size: int, me: int
) -> dict[str, Evaluation | str]:
    """The evaluation of each checkpoint by worker ``me`` of ``size``, or the name of one with the same weights."""
    from puma.models.weights import weights_sha256

    test, evaluated = puma.load_dataset(data), dict[str, str]()
    results: dict[str, Evaluation | str] = {}
    share = {**options, "worker": me, "num_workers": size, "progress": options["progress"] and me == 0}
    for name, network in networks.items():
        model = _model(network, test)
        results[name] = same = evaluated.setdefault(weights_sha256(model), name)
        if same == name:  # without validation images the last model is the best one known
            target = out / name if out and name == "best" else out
            results[name] = puma.evaluate(model.to(device), test, out=target, **share)
    return results


def _print_cost(networks: _Networks, data: str, device: str, options: dict[str, Any], workers: int) -> None:
    """Print what the evaluation of one checkpoint costs at most; it is timed on one batch."""
    from puma.evaluation import estimate_cost

    test, model = puma.load_dataset(data), next(iter(networks.values()))
    sizes = {name: options[name] for name in ("attack", "subset", "batch_size")}
    cost = estimate_cost(_model(model, test).to(device), test, **sizes)
    several = f" for each of {' and '.join(networks)}" if len(networks) > 1 else ""
    echo(f"images   {len(test):,}, of which {cost.images:,} are attacked ({options['attack']})")
    echo(f"passes   at most {cost.passes:,}{several}; images that fall early cost less")
    echo(f"time     at most {duration(cost.seconds / workers)} on {workers} x {device}{several}")


def _model(network: tuple[str, Path | None], test: Source) -> nn.Module:
    """The network that `resolve_model` finds; one by name and weights takes its sizes from the test images."""
    from puma.models.zoo import resolve_model

    (model, weights), (height, _, channels) = network, test.image_shape
    sizes: dict[str, Any] = {"num_classes": test.num_classes, "in_channels": channels, "image_size": height}
    return resolve_model(model) if weights is None else resolve_model(model, weights, **sizes)


def _print(result: Evaluation, name: str) -> None:
    lines = result.describe().splitlines()
    if result.apgd_accuracy is not None and result.attack == "standard":
        lines.append(f"after APGD-CE alone {result.apgd_accuracy:.2%}; cost {result.attack_cost:,} forward passes")
    for warning in result.warnings:
        lines += [f"AutoAttack warns ({warning['flag']}): {warning['means']}", f"  what to do: {warning['do']}"]
    if result.path is not None:
        lines.append(f"{result.path}, flags of every image in {result.path.with_suffix('.parquet').name}")
    echo("\n  ".join([f"{name}:", *lines]))
