"""Label quality and label issues of a pool under a model (cleanlab, extra ``labels``): columns beside the margins.

Confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068) assumes probabilities of images that the model
was not trained on; a model trained on the synthetic images has memorised some of their wrong labels and flags fewer.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.data.pool import Pool, read_batch
from puma.data.source import Source
from puma.errors import ModelError, UsageError
from puma.io import Shards
from puma.margins import LABEL_ISSUE, LABEL_QUALITY, PART_ROWS, Columns, MarginTable, Status
from puma.models.checks import apply_model, device_of
from puma.scoring.parts import Done, Rows, TableParts, checked_pool, pool_columns, table_meta, write_arrays

_PROBABILITIES = ".probabilities"  # folder, in that of the table, of the class probabilities until it is finished


def score_labels(
    model: nn.Module,
    pool: Pool | Source,
    *,
    out: Path | str,
    batch_size: int = 512,
    part_rows: int = PART_ROWS,
    progress: bool = False,
) -> MarginTable:
    """Give every image of a pool the scores ``label_quality`` and ``label_issue``. Resumes by itself.

    ``label_quality`` is cleanlab's normalized margin, (probability of the label - largest other one + 1) / 2 in [0, 1]:
    below 0.5 the model gives another class. ``label_issue`` is 1 (else 0) for the n images of lowest quality among
    those given another class, where n is the number of wrong labels that confident learning estimates.

    Arguments as `puma.score_margins`. Until the table is finished, ``out`` holds the class probabilities too (4 bytes x
    N x classes). It has no margins, and is joined to the margin table of the same pool (`MarginTable.join`).
    `ModelError` for a model in training mode, of another number of classes, or with logits that are not finite.
    """
    cleanlab, pool = require_cleanlab(), checked_pool(model, pool)
    table = TableParts(out, LabelSettings(batch_size, part_rows), [model], pool)
    with table.held():
        if table.missing(range(len(table.ranges))):
            shards = Shards(table.folder / _PROBABILITIES, table.meta, suffix=".npy")
            parts = dict(enumerate(table.ranges))
            predict = partial(_probabilities, model, pool.num_classes)
            write_arrays(shards, pool, parts, predict, device_of(model), batch_size, "label quality", progress)
            options: dict[str, Any] = {"store_results": False, "quality_score_kwargs": {"method": "normalized_margin"}}
            inspector = cleanlab.LabelInspector(num_class=pool.num_classes, verbose=False, **options)
            _write_table(table, pool, [shards.path(part) for part in parts], inspector)
        shutil.rmtree(table.folder / _PROBABILITIES, ignore_errors=True)
    return MarginTable.read(out)


@dataclass(frozen=True)
class LabelSettings:
    """What decides the bytes of a table of label scores."""

    batch_size: int = 512
    part_rows: int = PART_ROWS

    def meta(self, models: Sequence[nn.Module], pool: Pool) -> dict[str, Any]:
        """The metadata of the table."""
        settings = {"part_rows": self.part_rows, "batch_size": self.batch_size}
        return table_meta("label-quality", "Linf", settings, pool, *models)

    @torch.no_grad()
    def score_rows(self, models: Sequence[nn.Module], pool: Pool, rows: Rows, done: Done) -> Columns:
        """Columns as large, and as long to compute, as those of some rows, which only the whole pool decides."""
        rows, model = np.asarray(rows), models[-1]
        images, _ = read_batch(pool, rows, device_of(model))
        largest, predicted = _probabilities(model, pool.num_classes, images).float().cpu().max(1)
        done(len(rows))
        return _columns(pool, rows, predicted.numpy(), largest.numpy(), np.zeros(len(rows)))


def require_cleanlab() -> Any:
    """cleanlab's module of batched label issues, or `UsageError` with the command that installs it."""
    try:
        import cleanlab.experimental.label_issues_batched as label_issues_batched
    except ImportError:
        raise UsageError("cleanlab is not installed", fix='pip install "puma-robust[labels]"') from None
    return label_issues_batched


def _probabilities(model: nn.Module, classes: int, images: Tensor) -> Tensor:
    logits = apply_model(model, images)
    if logits.shape[1] != classes:
        raise ModelError(f"the model gives {tuple(logits.shape)} for {classes} classes")
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the model gives NaN or infinite logits")
    return logits.double().softmax(1)


def _write_table(table: TableParts, pool: Pool, paths: list[Path], inspector: Any) -> None:
    """Two passes over the probabilities (confident thresholds, then scores), then the parts of the table."""
    labels = pool.labels
    for part, path in zip(table.ranges, paths, strict=True):
        inspector.update_confident_thresholds(labels[part.start : part.stop], np.load(path))
    quality, predicted = np.empty(len(pool), np.float32), np.empty(len(pool), np.int16)
    for part, path in zip(table.ranges, paths, strict=True):
        rows, probabilities = slice(part.start, part.stop), np.load(path)
        quality[rows] = inspector.score_label_quality(labels[rows], probabilities)
        predicted[rows] = probabilities.argmax(1)
    issue = np.zeros(len(pool), dtype=bool)
    issue[np.argsort(quality, kind="stable")[: inspector.get_num_issues()]] = True
    issue &= predicted != labels
    for number, part in enumerate(table.ranges):
        own = np.arange(part.start, part.stop)
        table.write(number, _columns(pool, own, predicted[own], quality[own], issue[own]))


def _columns(pool: Pool, rows: NDArray[Any], predicted: NDArray[Any], quality: NDArray[Any], issue: Any) -> Columns:
    status = np.where(predicted == pool.labels[rows], Status.ESTIMATED, Status.MISCLASSIFIED)
    return pool_columns(pool, rows) | {
        "predicted": predicted.astype(np.int16),
        "status": status.astype(np.int8),
        "steps": np.zeros(len(rows), np.int16),
        LABEL_QUALITY: quality,
        LABEL_ISSUE: issue.astype(np.float32),
    }
