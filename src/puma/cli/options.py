"""Options that several commands share, spelt and explained once, and how a command shares its work."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer import Option

from puma.devices import resolve_device
from puma.errors import UsageError, unknown
from puma.io import REGISTRIES, read_toml
from puma.tasks import Workers, worker_from_environment
from puma.threat import ThreatModel


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the settings of a TOML file the defaults of this command: flags still win over them."""
    if path is None:
        return None
    names = {
        name.lstrip("-").replace("-", "_"): str(parameter.name)
        for parameter in context.command.params
        for name in (*parameter.opts, str(parameter.name))
    }
    defaults: dict[str, Any] = {}
    for key, value in read_toml(path).items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            raise unknown(f"setting in {path}", key, names)
        registry, colon, _ = str(value).partition(":")
        if name == "model" and colon and registry not in REGISTRIES:  # package.module:factory
            why = "a settings file may come from somebody else; only the command line names code to run"
            what = f"{path} sets {key} = {value!r}, which would run code"
            raise UsageError(what, why=why, fix="name it on the command line")
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def parse_threat(text: str) -> ThreatModel:
    """The value of ``--threat``, with the hint of `ThreatModel.parse` in Typer's own error."""
    try:
        return ThreatModel.parse(text)
    except UsageError as error:
        raise typer.BadParameter("; ".join(filter(None, (error.what, error.why, error.fix)))) from None


def completion(*names: str) -> Callable[[str], list[str]]:
    """What completes a value in the shell: these names, or those that "module:function" gives, loaded only then."""

    def complete(incomplete: str) -> list[str]:
        module, _, function = names[0].partition(":")
        known = getattr(import_module(module), function)() if function else names
        return [name for name in known if name.startswith(incomplete)]

    return complete


_CONFIG = "TOML file of this command's settings; flags win."
Config = Annotated[Path | None, Option("--config", callback=_load_config, is_eager=True, help=_CONFIG)]
_THREAT = 'Threat model, "Linf:8/255" or "L2:0.5".'
Threat = Annotated[ThreatModel, Option("--threat", parser=parse_threat, metavar="NORM:EPS", help=_THREAT)]
Quiet = Annotated[bool, Option("--quiet", help="No progress.")]
Seed = Annotated[int, Option("--seed", min=0, help="Seed of everything random.")]
DryRun = Annotated[bool, Option("--dry-run", help="Say what it will cost, and stop.")]
Device = Annotated[str, Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Devices = Annotated[int, Option("--devices", min=1, help="Share the work among so many processes, one for each GPU.")]
Jobs = Annotated[int, Option("--jobs", min=1, help="Processes on this machine; they share its cores and its GPUs.")]
_NUMBER = "Number of this process, from 0; else torchrun's or SLURM's."
Worker = Annotated[int | None, Option("--worker", min=0, help=_NUMBER)]
NumWorkers = Annotated[int | None, Option("--num-workers", min=1, help="Processes that share --out.")]
_ENGINE, _ENGINES = "local, or ray (--out seen by every machine).", completion("local", "ray")
Engine = Annotated[str, Option("--engine", help=_ENGINE, autocompletion=_ENGINES)]
Address = Annotated[str | None, Option("--address", help="Ray cluster, as host:6379; without it one starts here.")]
_RULES, _STRATEGIES = "A rule; `puma plan --list` names them all.", completion("puma.strategies:names")
Strategy = Annotated[str, Option("--strategy", help=_RULES, autocompletion=_STRATEGIES)]
_NAMES, _RECIPES = "A name of `puma recipe list`, or a TOML file.", completion("puma.training.recipe:recipe_names")
RecipeName = Annotated[str, Option("--recipe", help=_NAMES, autocompletion=_RECIPES)]
_MODELS = "small-cnn, wrn-D-K, preactresnet-18, timm:NAME, torchvision:NAME, or package.module:factory."
_NETWORKS = completion("small-cnn", *(f"wrn-{size}" for size in ("16-4", "28-10", "34-10")), "preactresnet-18")
ModelName = Annotated[str, Option("--model", help=_MODELS, autocompletion=_NETWORKS)]


class Share(NamedTuple):
    """Which share of the work this process does (worker ``worker`` of ``num_workers`` started from outside), and where.

    ``workers`` says whether it runs its share here, in processes of its own, or on Ray.
    """

    worker: int
    num_workers: int
    device: str
    workers: Workers


def share_of(
    device: str = "auto",
    devices: int = 1,
    worker: int | None = None,
    num_workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
) -> Share:
    """The share that the options, or else torchrun's or SLURM's variables, give to this process."""
    if engine not in ("local", "ray"):
        raise unknown("engine", engine, ("local", "ray"))
    if (worker is None) != (num_workers is None):
        raise UsageError("--worker and --num-workers belong together", fix="--worker 0 --num-workers 2, and so on")
    if worker is not None and num_workers is not None and worker >= num_workers:
        raise UsageError(f"--worker {worker} of --num-workers {num_workers}", fix="count workers from 0")
    if (engine == "ray") + (devices > 1) + (worker is not None) > 1:
        what = "--engine ray, --worker and --devices (--jobs) are three ways to share work"
        raise UsageError(what, fix="choose one of them")
    if address is not None and engine != "ray":
        raise UsageError("--address is for --engine ray")
    me, size, local = (worker, num_workers, 0) if worker is not None else worker_from_environment()
    me, size, local = (0, 1, 0) if engine == "ray" or devices > 1 else (me, size, local)
    place = resolve_device(device, local)
    gpus = int(place.type == "cuda")
    ray = (address or "local") if engine == "ray" else None
    own = "cuda" if gpus and (ray or devices > 1) else str(place)  # such processes see one GPU each
    return Share(me or 0, size or 1, own, Workers(devices, gpus=gpus, ray=ray))
