"""The folder of a run: what it was made with, its metrics and its models."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from puma.errors import DataError, ModelError, UsageError, unknown
from puma.io import claim_folder, digest_path, fingerprint, recorded_sha256, sha256_file, storage_errors, write_text
from puma.models.weights import SCHEMA as MODEL_SCHEMA
from puma.models.weights import load_model, load_tensors
from puma.training.recipe import Recipe

SCHEMA = "puma.run/2"
LOGGERS = ("tensorboard", "wandb", "mlflow")
COLUMNS = (
    "step",
    "draws",
    "unique_images",
    "learning_rate",
    "momentum",
    "loss",
    "clean_accuracy",
    "adversarial_accuracy",
    "mean_eps",
    "validation_clean",
    "validation_robust",
    "seconds",
    "images_per_second",
)


@dataclass
class Run:
    """A finished training.

    Args:
        model: the averaged (EMA) network after the last step, in eval mode.
        best: the averaged network of the best checkpoint, chosen on validation images; without validation, `model`.
        folder: where it was written, or None.
        metrics: rows of ``metrics.csv``.
        meta: ``steps``, ``draws`` (images drawn), ``unique_images``, ``best_step``, ``best_validation`` (robust
            accuracy under PGD with the CW loss, or None), ``trained_on`` (rows that could be drawn),
            ``validation_images``, ``attack_cost`` (gradients of the attack, as a share of ``attack_steps`` for
            every image), ``seconds``.
    """

    model: nn.Module
    best: nn.Module
    folder: Path | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path | str, like: nn.Module | None = None) -> Run:
        """Read a finished run from its folder.

        Args:
            folder: the run's folder.
            like: a network of the same architecture, where PUMA did not build it.

        Raises:
            ModelError: it is not finished, or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / "last.safetensors").is_file():
            raise ModelError(f"{folder} is not a finished run", fix="run the same training again: it goes on")
        _, meta = load_tensors(folder / "last.safetensors", MODEL_SCHEMA)
        models = [load_model(folder / f"{which}.safetensors", like) for which in ("last", "best")]
        return cls(models[0], models[1], folder, read_metrics(folder / "metrics.csv"), meta["training"])


def open_folder(folder: Path, recipe: Recipe, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    """Create a run's folder, or make sure that what is there was made with the same settings.

    Args:
        folder: the run's folder.
        recipe: the recipe; written as ``recipe.toml`` too.
        settings: what else decides the result: network, threat model, seed, pool, plan, beta, validation.
        environment: of `puma.devices.environment`.

    Returns:
        What differs in the environment, so that going on is not bit-exact (a warning names it).

    Raises:
        ResumeError: it belongs to a run with other settings; both values are named.
        StorageError: it cannot be written.
    """
    fields = recipe.model_dump(mode="json", exclude={"name", "source"})
    everything = {**{f"recipe.{key}": value for key, value in fields.items()}, **settings}
    changed = claim_folder(folder, everything, environment=environment, record="run.json", schema=SCHEMA)
    if not (folder / "recipe.toml").is_file():
        write_text(folder / "recipe.toml", recipe.to_toml())
    return changed


class Metrics:
    """Rows of figures, in memory and, with a folder, in ``metrics.csv``.

    Args:
        folder: the run's folder, or None.
        upto: keep earlier rows up to this step; later ones belong to work that was lost.
        logger: where else the figures go, see `LOGGERS`.
    """

    def __init__(self, folder: Path | None, upto: int = 0, *, logger: str | None = None) -> None:
        self._path = folder / "metrics.csv" if folder else None
        self.rows: list[dict[str, float]] = []
        if self._path and self._path.is_file():
            self.rows = [row for row in read_metrics(self._path) if row["step"] <= upto]
        if self._path:
            digest_path(self._path).unlink(missing_ok=True)
            write_text(self._path, _csv([COLUMNS, *map(_cells, self.rows)]))
        self._logger = _logger(logger, folder, upto) if folder and logger else None

    def add(self, **values: float) -> None:
        """Append a row; what is not given stays empty."""
        self.rows.append(values)
        if self._logger is not None:
            parts = {name: "validation" if name.startswith("validation_") else "train" for name in values}
            named = {f"{part}/{name.removeprefix('validation_')}": values[name] for name, part in parts.items()}
            self._logger.log_metrics(named, int(values["step"]))
            self._logger.save()
        if self._path:
            with storage_errors(self._path), self._path.open("a", newline="") as file:
                file.write(_csv([_cells(values)]))

    def close(self) -> None:
        """Record the checksum of the finished file."""
        if self._path:
            write_text(digest_path(self._path), sha256_file(self._path) + "\n")


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Read ``metrics.csv``; a last line that was cut off is left out, a finished file is checked (`DataError`)."""
    if (stated := recorded_sha256(Path(path))) and sha256_file(path) not in stated:
        raise DataError(f"{path} is damaged: its checksum does not fit", fix="restore it from a copy")
    rows = []
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({key: float(value) for key, value in row.items() if value not in ("", None)})
            except (TypeError, ValueError):
                continue
    return [row for row in rows if "step" in row]


def require_logger(name: str | None, folder: Path | str | None) -> None:
    """Refuse a logger that cannot be used, before anything is made.

    Raises:
        UsageError: unknown, not installed, or without a folder.
    """
    if name is None:
        return
    if name not in LOGGERS:
        raise unknown("logger", name, LOGGERS)
    if find_spec(name) is None:
        raise UsageError(f"logger {name} needs the package {name}", fix=f"pip install {name}")
    if folder is None:
        raise UsageError(f"logger {name} needs an output folder", fix="out=...")


def _logger(name: str, folder: Path, upto: int) -> Any:
    """A logger of Lightning Fabric's kind for a run folder, that goes on after step ``upto``."""
    if name == "tensorboard":
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        return TensorBoardLogger(folder, name="tensorboard", version="", purge_step=upto + 1)
    identity = fingerprint(str(folder.resolve()))[:16]  # the same run again where a training is resumed
    if name == "wandb":
        from wandb.integration.lightning.fabric import WandbLogger  # type: ignore[import-not-found,unused-ignore]

        return WandbLogger(name=folder.name, project="puma", save_dir=folder, id=identity, resume="allow")
    return _MLflowLogger(folder.name, identity)


class _MLflowLogger:
    """Metrics to the server of ``MLFLOW_TRACKING_URI``, in the run that is tagged with the folder's identity."""

    def __init__(self, name: str, identity: str) -> None:
        import mlflow  # type: ignore[import-not-found,unused-ignore]

        before = mlflow.search_runs(filter_string=f"tags.puma = '{identity}'", output_format="list")
        run = before[0].info.run_id if before else None
        self._run: str = mlflow.start_run(run_id=run, run_name=name, tags={"puma": identity}).info.run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        import mlflow  # type: ignore[import-not-found,unused-ignore]

        mlflow.log_metrics(dict(metrics), step=step, run_id=self._run)

    def save(self) -> None:
        """Nothing is left to do: `log_metrics` waits for the server."""


def _cells(row: dict[str, float]) -> list[str]:
    return [f"{row[name]:.8g}" if name in row else "" for name in COLUMNS]


def _csv(rows: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
