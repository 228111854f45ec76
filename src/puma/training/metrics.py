"""``metrics.csv``: one row every few steps, written while training runs and cut back when it resumes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from puma.errors import UsageError
from puma.io import storage_errors, write_text

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
            write_text(self._path, _text([COLUMNS, *(self._cells(row) for row in self.rows)]))

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
                file.write(_text([self._cells(values)]))

    @staticmethod
    def _cells(row: dict[str, float]) -> list[str]:
        return [f"{row[name]:.8g}" if name in row else "" for name in COLUMNS]


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


def _text(rows: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
