"""A run: its folder with models and settings, its metrics, what it will cost, and the request to stop it."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from puma.devices import PROCESSES_PER_GPU, Devices
from puma.errors import ModelError, UsageError, first_line, unknown
from puma.io import claim_folder, digest_path, fingerprint, require_digest, sha256_file, storage_errors, write_text
from puma.models.checks import as_logits
from puma.models.weights import SCHEMA as MODEL_SCHEMA
from puma.models.weights import load_model, load_tensors
from puma.training.recipe import Recipe

SCHEMA = "puma.run/2"
LOGGERS = ("tensorboard", "wandb", "mlflow")
COLUMNS = (
    "step", "draws", "unique_images", "learning_rate", "momentum", "loss", "clean_accuracy", "adversarial_accuracy",
    "mean_eps", "validation_clean", "validation_robust", "seconds", "images_per_second",
)  # fmt: skip
_PATIENCE_S = 5.0  # without a finished step, after a signal, where several processes train
_SHARE = 0.8  # of the free memory that a training may plan with
_SLACK = 1.3  # gradients and work space beside what autograd keeps, measured on WRN and PreActResNet
_MOST_DAYS = 30.0
_GIB = 1 << 30


@dataclass
class Run:
    """A finished training.

    ``meta`` holds ``steps``, ``draws`` (images drawn), ``unique_images``, ``best_step``, ``best_validation`` (robust
    accuracy under PGD with the CW loss, or None), ``trained_on`` (rows that could be drawn), ``validation_images``,
    ``seconds``.
    """

    model: nn.Module  # the averaged (EMA) network after the last step, in eval mode
    best: nn.Module  # that of the best checkpoint, chosen on validation images; without validation, `model`
    folder: Path | None = None  # where it was written
    metrics: list[dict[str, float]] = field(default_factory=list)  # rows of ``metrics.csv``
    meta: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        place = f", in {self.folder}" if self.folder else ""
        return f"<Run {self.meta.get('steps', 0):,} steps on {self.meta.get('trained_on', 0):,} images{place}>"

    @classmethod
    def read(cls, folder: Path | str, like: nn.Module | None = None) -> Run:
        """Read a finished run; ``like`` is a network of the same architecture, where PUMA did not build it.

        `ModelError` where it is not finished, or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / "last.safetensors").is_file():
            raise ModelError(f"{folder} is not a finished run", fix="run the same training again: it goes on")
        _, meta = load_tensors(folder / "last.safetensors", MODEL_SCHEMA)
        models = [load_model(folder / f"{which}.safetensors", like) for which in ("last", "best")]
        return cls(models[0], models[1], folder, read_metrics(folder / "metrics.csv"), meta["training"])


def open_folder(folder: Path, recipe: Recipe, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    """Create a run's folder, or make sure that it was made with the same recipe and settings (`claim_folder`)."""
    fields = recipe.model_dump(mode="json", exclude={"name", "source"})
    everything = {**{f"recipe.{key}": value for key, value in fields.items()}, **settings}
    changed = claim_folder(folder, everything, environment=environment, record="run.json", schema=SCHEMA)
    if not (folder / "recipe.toml").is_file():
        write_text(folder / "recipe.toml", recipe.to_toml())
    return changed


class Metrics:
    """Rows of figures, in memory, with a folder in ``metrics.csv``, and with a logger there too.

    Earlier rows are kept up to step ``upto``; later ones belong to work that was lost.
    """

    def __init__(self, folder: Path | None, upto: int = 0, *, logger: str | None = None) -> None:
        self._path = folder / "metrics.csv" if folder else None
        self.rows: list[dict[str, float]] = []
        if self._path:
            if self._path.is_file():
                self.rows = [row for row in read_metrics(self._path) if row["step"] <= upto]
            digest_path(self._path).unlink(missing_ok=True)
            write_text(self._path, "".join([",".join(COLUMNS) + "\n", *map(_line, self.rows)]))
        self._logger = _logger(logger, folder, upto) if folder and logger else None

    def add(self, **values: float) -> None:
        """Append a row; what is not given stays empty."""
        self.rows.append(values)
        if self._logger is not None:
            shown = {f"train/{name}".replace("train/validation_", "validation/"): values[name] for name in values}
            self._logger[0](shown, int(values["step"]))
        if self._path:
            with storage_errors(self._path), self._path.open("a", newline="") as file:
                file.write(_line(values))

    def close(self) -> None:
        """Record the checksum of the finished file, end the logger."""
        if self._logger is not None:
            self._logger[1]()
        if self._path:
            write_text(digest_path(self._path), sha256_file(self._path) + "\n")


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Read ``metrics.csv``; a last line that was cut off is left out, a finished file is checked (`DataError`)."""
    require_digest(Path(path), "restore it from a copy")
    rows = []
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            with suppress(TypeError, ValueError):
                rows.append({key: float(value) for key, value in row.items() if value not in ("", None)})
    return [row for row in rows if "step" in row]


def _line(row: Mapping[str, float]) -> str:
    return ",".join(f"{row[name]:.8g}" if name in row else "" for name in COLUMNS) + "\n"


def require_logger(name: str | None, folder: Path | str | None) -> None:
    """Refuse a logger that is unknown, not installed, or without a folder (`UsageError`), before anything is made."""
    if name is None:
        return
    if name not in LOGGERS:
        raise unknown("logger", name, LOGGERS)
    if find_spec(name) is None:
        raise UsageError(f"logger {name} needs the package {name}", fix=f"pip install {name}")
    if folder is None:
        raise UsageError(f"logger {name} needs an output folder", fix="out=...")


def _logger(name: str, folder: Path, upto: int) -> tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]:
    """What sends figures and their step to a logger, which goes on after step ``upto`` of a folder, and ends it."""
    identity = fingerprint(str(folder.resolve()))[:16]  # the same run again where a training is resumed
    try:
        if name == "mlflow":  # to the server of MLFLOW_TRACKING_URI
            import mlflow  # type: ignore[import-not-found,unused-ignore]  # not one of our extras

            before = mlflow.search_runs(filter_string=f"tags.puma = '{identity}'", output_format="list")
            begun = before[0].info.run_id if before else None
            mlflow.start_run(run_id=begun, run_name=folder.name, tags={"puma": identity})
            return mlflow.log_metrics, mlflow.end_run
        if name == "wandb":  # not Fabric's logger: that needs the whole package lightning
            import wandb  # type: ignore[import-not-found,unused-ignore]  # not one of our extras

            run = wandb.init(project="puma", name=folder.name, dir=folder, id=identity, resume="allow")
            return run.log, run.finish
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        board = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=upto + 1, flush_secs=10)
        return board.log_metrics, lambda: board.finalize("success")
    except Exception as error:  # not logged in, no server, a broken installation
        raise UsageError(f"logger {name} cannot be started", why=first_line(error)) from error


# --- the cost of a training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a training will need."""

    steps: int
    batch: int  # images a step in this process
    micro_batch: int  # images of one forward pass; less than `batch` where the whole batch does not fit
    memory: int  # bytes at the peak of a step, with `micro_batch`
    free: int  # bytes that are free on the device
    step_seconds: float

    def __str__(self) -> str:
        hours = self.steps * self.step_seconds / 3600
        span = f"{hours / 24:,.0f} days" if hours > 72 else f"{hours:.1f} h" if hours > 2 else f"{hours * 60:.1f} min"
        passes = "" if self.micro_batch == self.batch else f" in micro-batches of {self.micro_batch}"
        return (
            f"about {span} for {self.steps:,} steps of {self.batch} images{passes} ({self.step_seconds:.2g} s each), "
            f"and {self.memory / _GIB:.2g} of {self.free / _GIB:.3g} GiB of free memory"
        )

    def require_feasible(self) -> None:
        """`UsageError` for more memory than is free, or more than 30 days."""
        if self.memory > self.free:
            what = f"one step needs about {self.memory / _GIB:.2g} GiB, {self.free / _GIB:.2g} GiB are free"
            fix = "--set batch_size=..., a smaller model, another --device; --yes tries all the same"
            raise UsageError(what, fix=fix)
        if (days := self.steps * self.step_seconds / 86400) > _MOST_DAYS:
            why = f"{self.steps:,} steps of {self.batch} images, {self.step_seconds:,.3g} s each"
            fix = "a GPU (--device cuda), a smaller model, or fewer steps (--set steps=...); --yes goes on"
            raise UsageError(f"this training would take about {days:,.0f} days here", why=why, fix=fix)


def estimate(network: nn.Module, images: Tensor, recipe: Recipe, devices: Devices) -> Estimate:
    """Measure forward passes of a few images, float ``[b, C, H, W]``, of a network in eval mode, and scale them up."""
    batch = recipe.batch_size // devices.world_size
    with devices.autocast():
        kept = _kept_bytes(network, images[:2]) / len(images[:2])
        seconds = _seconds_per_image(network, images, batch)
    alone = recipe.objective == "pgd-at"  # one pass for the loss; else clean and adversarial pass, or clean and attack
    passes, graphs = (recipe.attack_steps * 2 + 3, 1) if alone else (recipe.attack_steps * 2 + 7, 2)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    fixed = weights * (5 if recipe.awp else 4) + 8 * batch * images[0].nbytes  # weights, gradients, momentum, EMA
    each = graphs * kept * _SLACK
    free = free_memory(devices.device) // (devices.world_size if devices.device.type == "cpu" else 1)
    micro = recipe.micro_batch or batch
    while not recipe.micro_batch and micro % 2 == 0 and fixed + micro * each > _SHARE * free:
        micro //= 2
    return Estimate(recipe.steps, batch, micro, int(fixed + micro * each), int(free), seconds * passes * batch)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device: at most this process's share of a GPU; for a CPU within its container's limits."""
    if device.type == "cuda":
        unused, total = torch.cuda.mem_get_info(device)
        return int(min(unused, total // int(os.environ.get(PROCESSES_PER_GPU, "1"))))
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    free += [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdecimal():
        free.append(max(int(limit[0]) - int(used[0]), 0))
    return min(free)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, without the weights."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = network(images.clone().requires_grad_())
    del logits
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@torch.no_grad()
def _seconds_per_image(network: nn.Module, images: Tensor, batch: int) -> float:
    """Of a forward pass, with as many images as take long enough to be measured."""
    count = min(len(images), batch)
    while True:
        many = images[:1].expand(count, *images.shape[1:]).contiguous()
        began = time.perf_counter()
        as_logits(network(many), count).sum().item()  # waits for the device
        elapsed = time.perf_counter() - began
        if elapsed > 0.02 or count * 4 > batch:
            return elapsed / count
        count *= 4


class StopRequest:
    """While inside, the first SIGTERM or SIGINT only sets `wanted`, so that the step ends and a checkpoint is written.

    A second Ctrl-C acts at once, a second SIGTERM does nothing: SLURM sends several. Outside the main thread this does
    nothing. Without ``single_process``, one that finishes no step for some seconds after the signal ends without a
    checkpoint: waiting for a dead one would take minutes.
    """

    def __init__(self, *, single_process: bool = True) -> None:
        self.wanted: int | None = None
        self._single_process = single_process
        self._watchdog: threading.Timer | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore(*self._before)
        self.heartbeat(ends=True)

    def heartbeat(self, *, ends: bool) -> None:
        """After a finished step: restart the watchdog, or cancel it, since a checkpoint may take any time to write."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self.wanted is not None and not ends and not self._single_process:
            self._watchdog = threading.Timer(_PATIENCE_S, os._exit, (128 + signal.SIGTERM,))
            self._watchdog.daemon = True
            self._watchdog.start()

    def stop(self) -> None:
        """End the process as the signal asks: KeyboardInterrupt, or exit code 143."""
        raise KeyboardInterrupt if self.wanted == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted is None:
            self.wanted = number
            self._restore(signal.SIGINT)
            self.heartbeat(ends=False)

    def _restore(self, *numbers: int) -> None:
        for number in self._before.keys() & numbers:
            signal.signal(number, self._before.pop(number))
