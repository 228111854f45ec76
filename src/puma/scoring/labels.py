"""Label quality and label issues of a pool under a model (cleanlab, extra ``labels``): columns beside the margins.

Confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068) assumes probabilities of images that the model
was not trained on; a model trained on the synthetic images has memorised some of their wrong labels and flags fewer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from puma.data.pool import Pool
from puma.data.source import Source
from puma.errors import ModelError, UsageError
from puma.io import Shards
from puma.margins import LABEL_ISSUE, LABEL_QUALITY, PART_ROWS, Columns, MarginTable, Status
from puma.models.checks import apply_model
from puma.models.modes import device_of
from puma.scoring.parts import TableParts, checked_pool, pool_columns, table_meta, write_arrays


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

    Raises:
        UsageError: cleanlab is not installed.
        ModelError: a model in training mode, of another number of classes, or with logits that are not finite.
    """
    try:
        from cleanlab.experimental.label_issues_batched import LabelInspector
    except ImportError:
        raise UsageError("cleanlab is not installed", fix='pip install "puma-robust[labels]"') from None
    pool = checked_pool(model, pool)
    meta = table_meta("label-quality", "Linf", {"part_rows": part_rows, "batch_size": batch_size}, pool, model)
    table = TableParts(out, meta, device_of(model))

    def predict(images: Tensor) -> Tensor:
        logits = apply_model(model, images)
        if logits.shape[1] != pool.num_classes:
            raise ModelError(f"the model gives {tuple(logits.shape)} for {pool.num_classes} classes")
        if not bool(torch.isfinite(logits).all()):
            raise ModelError("the model gives NaN or infinite logits")
        return logits.double().softmax(1)

    with table.held():
        if table.missing(range(len(table.ranges))):
            shards, parts = Shards(table.folder / ".probabilities", meta, suffix=".npy"), dict(enumerate(table.ranges))
            write_arrays(shards, pool, parts, predict, device_of(model), batch_size, "label quality", progress)
            inspector = LabelInspector(
                num_class=pool.num_classes,
                store_results=False,
                verbose=False,
                quality_score_kwargs={"method": "normalized_margin"},
            )
            _write_table(table, pool, [shards.path(part) for part in parts], inspector)
        shutil.rmtree(table.folder / ".probabilities", ignore_errors=True)
    return MarginTable.read(out)


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
    status = np.where(predicted == labels, Status.ESTIMATED, Status.MISCLASSIFIED)
    for number, part in enumerate(table.ranges):
        rows = slice(part.start, part.stop)
        columns: Columns = pool_columns(pool, np.arange(part.start, part.stop)) | {
            "predicted": predicted[rows],
            "status": status[rows].astype(np.int8),
            "steps": np.zeros(len(part), np.int16),
            LABEL_QUALITY: quality[rows],
            LABEL_ISSUE: issue[rows].astype(np.float32),
        }
        table.write(number, columns)
