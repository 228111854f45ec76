"""The folder of a run: what it was made with, its metrics and its models."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from puma.errors import ModelError, UsageError
from puma.io import claim_folder, storage_errors, write_text
from puma.models.weights import SCHEMA as MODEL_SCHEMA
from puma.models.weights import load_model, load_tensors
from puma.training.recipe import Recipe

SCHEMA = "puma.run/2"
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
        tensorboard: write the figures to ``tensorboard/`` in the folder too.

    Raises:
        UsageError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, upto: int = 0, *, tensorboard: bool = False) -> None:
        self._path = folder / "metrics.csv" if folder else None
        self.rows: list[dict[str, float]] = []
        if self._path and self._path.is_file():
            self.rows = [row for row in read_metrics(self._path) if row["step"] <= upto]
        if self._path:
            write_text(self._path, _csv([COLUMNS, *map(_cells, self.rows)]))
        self._board = _board(folder, upto) if folder and tensorboard else None

    def add(self, **values: float) -> None:
        """Append a row; what is not given stays empty."""
        self.rows.append(values)
        if self._board is not None:
            for name in values.keys() - {"step"}:
                part = "validation" if name.startswith("validation_") else "train"
                self._board.add_scalar(f"{part}/{name.removeprefix('validation_')}", values[name], int(values["step"]))
            self._board.flush()
        if self._path:
            with storage_errors(self._path), self._path.open("a", newline="") as file:
                file.write(_csv([_cells(values)]))


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Read ``metrics.csv``; a last line that was cut off is left out."""
    rows = []
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({key: float(value) for key, value in row.items() if value not in ("", None)})
            except (TypeError, ValueError):
                continue
    return [row for row in rows if "step" in row]


def _board(folder: Path, upto: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("TensorBoard is not installed", fix="pip install 'puma-robust[tracking]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=upto + 1)


def _cells(row: dict[str, float]) -> list[str]:
    return [f"{row[name]:.8g}" if name in row else "" for name in COLUMNS]


def _csv(rows: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
