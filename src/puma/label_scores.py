"""Label quality of a whole pool under a model: the columns of `puma.label_quality` as a score table beside the margins.

One forward pass over the pool, part by part; what is finished is not done again. The table joins a margin table of the
same pool: ``table.join(score_labels(model, pool, out="label-quality/"))``.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma.data.pool import Pool
from puma.data.source import Source
from puma.data.tensors import read_batch
from puma.errors import ModelError, ResumeError
from puma.io import atomic_path, lock, prepare_folder, read_json, write_json
from puma.label_quality import (
    AGREEMENT,
    CONFIDENT_LEARNING,
    Ranked,
    agreement,
    class_thresholds,
    confident_joint,
)
from puma.margins import PART_ROWS, MarginTable, Status, differences, write_part
from puma.models.weights import weights_sha256
from puma.progress import Progress

logger = logging.getLogger("puma")

_TOP = 10
_PREDICTIONS, _RECORD = ".predictions", "table.json"
Part = dict[str, NDArray[Any]]


def score_labels(
    model: nn.Module,
    pool: Pool | Source,
    *,
    out: Path | str,
    batch_size: int = 512,
    part_rows: int = PART_ROWS,
    progress: bool = False,
) -> MarginTable:
    """Give every image of a pool the scores ``agreement`` and ``confident-learning`` (1 = probably a wrong label).

    Args:
        model: the margin model, in eval mode, on the device to use.
        pool: a `Pool`, or one source.
        out: folder of the table; run again, it goes on where it was stopped.
        batch_size: images per forward pass.
        part_rows: rows of one part.
        progress: show a bar.

    Returns:
        A table without margins, whose ``scores`` hold the two columns; its ``meta["settings"]`` hold the class
        thresholds of confident learning, and ``wrong_labels``: for each source the share of wrong labels that it
        estimates, in [0, 1].

    Raises:
        ModelError: a model in training mode, of another number of classes, or with logits that are not finite.
        ResumeError: ``out`` holds a table made otherwise, or a live process is writing it.
        StorageError: ``out`` cannot be written.
    """
    whole = pool if isinstance(pool, Pool) else Pool([pool])
    if model.training:
        raise ModelError("the model is in training mode", why="its answer depends on the batch", fix="model.eval()")
    folder = prepare_folder(out)
    config = getattr(model, "config", None)
    name = config.get("name") if isinstance(config, dict) else type(model).__name__
    meta = {
        "norm": "Linf",
        "mode": "label-quality",
        "settings": {"part_rows": part_rows, "batch_size": batch_size},
        "model": {"name": name, "sha256": weights_sha256(model)},
        "pool": whole.describe(),
    }
    with lock(folder):
        if _finished(folder, meta):
            return MarginTable.read(folder)
        (folder / _PREDICTIONS).mkdir(exist_ok=True)
        bounds = [(start, min(start + part_rows, len(whole))) for start in range(0, len(whole), part_rows)]
        with Progress("label quality", len(whole), "images", show=progress) as bar:
            for part, (start, stop) in enumerate(bounds):
                if _read_prediction(folder, part, stop - start) is None:
                    _write_prediction(folder, part, _predicted(model, whole, start, stop, batch_size))
                bar.advance(stop - start)
        _write_table(folder, whole, bounds, meta)
        shutil.rmtree(folder / _PREDICTIONS)
    return MarginTable.read(folder)


@torch.no_grad()
def _predicted(model: nn.Module, pool: Pool, start: int, stop: int, batch_size: int) -> Part:
    """What is kept of the probabilities of rows ``start`` to ``stop``."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    pieces: list[Part] = []
    for first in range(start, stop, batch_size):
        rows = np.arange(first, min(first + batch_size, stop))
        images, _ = read_batch(pool, rows, device)
        logits = model(images)
        if logits.shape != (len(rows), pool.num_classes):
            raise ModelError(f"the model gives {tuple(logits.shape)} for {pool.num_classes} classes")
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(f"the model gives NaN or infinite logits among rows {first} to {rows[-1]}")
        probabilities = logits.double().softmax(1).cpu().numpy()
        labels = pool.labels[rows]
        ranked = Ranked.of(probabilities, _TOP)
        pieces.append(
            {
                "classes": ranked.classes,
                "probabilities": ranked.probabilities,
                "own": probabilities[np.arange(len(rows)), labels],
                "agreement": agreement(probabilities, labels),
            }
        )
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _write_table(folder: Path, pool: Pool, bounds: list[tuple[int, int]], meta: dict[str, Any]) -> None:
    """What follows from what the first pass kept: thresholds need every image, flags need the thresholds."""
    own = np.concatenate([part["own"] for part in _predictions(folder, bounds)])
    thresholds = class_thresholds(own, pool.labels, pool.num_classes)
    counted = np.concatenate([_ranked(part).counted_to(thresholds) for part in _predictions(folder, bounds)])
    settings = {
        **meta["settings"],
        "thresholds": [float(t) if np.isfinite(t) else None for t in thresholds],
        "wrong_labels": _wrong_labels(pool, counted),
    }
    for number, part in enumerate(_predictions(folder, bounds)):
        start, stop = bounds[number]
        if number == 0 and not _ranked(part).exact(thresholds, pool.num_classes):
            logger.warning(
                "the model is so unsure of some class (threshold %.3f) that flags beyond its %d most probable classes "
                "are missed",
                thresholds.min(),
                _TOP,
            )
        to, labels, predicted = counted[start:stop], pool.labels[start:stop], part["classes"][:, 0]
        columns: Part = {
            "index": np.arange(start, stop, dtype=np.int64),
            "label": labels.astype(np.int16),
            "predicted": predicted,
            "status": np.where(predicted == labels, Status.ESTIMATED, Status.MISCLASSIFIED).astype(np.int8),
            "steps": np.zeros(stop - start, np.int16),
            "source": pool.source.codes[start:stop],
            AGREEMENT: part["agreement"],
            CONFIDENT_LEARNING: ((to >= 0) & (to != labels)).astype(np.float32),
        }
        write_part(folder, number, columns, {**meta, "settings": settings})
    write_json(folder / _RECORD, {"meta": {**meta, "settings": settings}})


def _ranked(part: Part) -> Ranked:
    return Ranked(part["classes"], part["probabilities"])


def _wrong_labels(pool: Pool, counted: NDArray[np.int16]) -> dict[str, float]:
    """The estimated share of wrong labels of each source: what its confident joint holds off the diagonal."""
    shares = {}
    for code, name in enumerate(pool.names):
        rows = pool.source.codes == code
        joint = confident_joint(counted[rows], pool.labels[rows], pool.num_classes)
        shares[name] = float(1 - np.trace(joint))
    return shares


def _finished(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether the table is there already.

    Raises:
        ResumeError: it is another one.
    """
    began = folder / _PREDICTIONS / _RECORD
    record = folder / _RECORD if (folder / _RECORD).is_file() else began
    if record.is_file():
        known = read_json(record)["meta"]
        settings = {name: known["settings"].get(name) for name in meta["settings"]}
        if changed := list(differences({**known, "settings": settings}, meta)):
            raise ResumeError(
                f"{folder} was made with other settings", why="; ".join(changed), fix="another output folder"
            )
        return record != began
    write_json(began, {"meta": meta})
    return False


def _predictions(folder: Path, bounds: list[tuple[int, int]]) -> Iterator[Part]:
    for number, (start, stop) in enumerate(bounds):
        part = _read_prediction(folder, number, stop - start)
        if part is None:
            raise ResumeError(f"part {number} of {folder / _PREDICTIONS} vanished", fix="run it again")
        yield part


def _write_prediction(folder: Path, number: int, part: Part) -> None:
    with atomic_path(folder / _PREDICTIONS / f"part-{number:06d}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **part)


def _read_prediction(folder: Path, number: int, rows: int) -> Part | None:
    """A finished part of the first pass; None where it is missing or damaged."""
    path = folder / _PREDICTIONS / f"part-{number:06d}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            part = {name: file[name] for name in ("classes", "probabilities", "own", "agreement")}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    return part if all(len(column) == rows for column in part.values()) else None
