"""`score_margins`: the margins of a pool, in memory or in a folder that resumes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from torch import nn

from puma.attacks.deepfool import Mode, Precision
from puma.data.pool import Pool
from puma.data.source import Source
from puma.errors import UsageError
from puma.margins import PART_ROWS, MarginTable
from puma.progress import Progress
from puma.scoring.health import check_model, device_of
from puma.scoring.parts import PartFolder
from puma.scoring.settings import ScoringSettings, environment, sized
from puma.scoring.stream import Columns, score_rows
from puma.scoring.workers import share
from puma.threat import Norm


@overload
def score_margins(
    model: nn.Module,
    pool: Pool | Source,
    *,
    norm: Norm = ...,
    mode: Mode = ...,
    out: Path | str | None = ...,
    steps: int = ...,
    batch_size: int | None = ...,
    chunk: int | None = ...,
    part_rows: int = ...,
    precision: Precision = ...,
    compile: bool = ...,
    worker: int = ...,
    num_workers: Literal[1] = ...,
    progress: bool = ...,
) -> MarginTable: ...
@overload
def score_margins(
    model: nn.Module,
    pool: Pool | Source,
    *,
    norm: Norm = ...,
    mode: Mode = ...,
    out: Path | str | None = ...,
    steps: int = ...,
    batch_size: int | None = ...,
    chunk: int | None = ...,
    part_rows: int = ...,
    precision: Precision = ...,
    compile: bool = ...,
    worker: int = ...,
    num_workers: int,
    progress: bool = ...,
) -> MarginTable | None: ...
def score_margins(
    model: nn.Module,
    pool: Pool | Source,
    *,
    norm: Norm = "Linf",
    mode: Mode = "refined",
    out: Path | str | None = None,
    steps: int = 50,
    batch_size: int | None = None,
    chunk: int | None = None,
    part_rows: int = PART_ROWS,
    precision: Precision = "float32",
    compile: bool = False,
    worker: int = 0,
    num_workers: int = 1,
    progress: bool = False,
) -> MarginTable | None:
    """Measure the margin of every image of a pool.

    Args:
        model: the margin model, in eval mode, on the device to use; it is not changed.
        pool: a `Pool`, or one source.
        norm: ``"Linf"`` or ``"L2"``.
        mode: as in `puma.deepfool`.
        out: folder of the table; what is finished there is kept and not done again. None: memory only.
        steps: linearisations at most for one image.
        batch_size: images searched together; default 512, or 4096 on a GPU.
        chunk: images per pass; default 64, or 1024 on a GPU.
        part_rows: rows of one part.
        precision: ``"bf16"`` computes gradients in bfloat16; crossings are seen in float32 either way.
        compile: search with ``torch.compile``'s version of the model; crossings are confirmed by ``model`` itself.
        worker: number of this process among ``num_workers`` that share ``out``.
        num_workers: processes that share the work, part by part; they need not talk to each other.
        progress: show a bar.

    Returns:
        The table. With several workers: the table if every part is there by now, else None.

    Raises:
        ModelError: a model in training mode, or whose answer depends on the batch.
        ResumeError: ``out`` holds another table, or a live process is writing it.
        UsageError: a worker number that does not exist, several workers without ``out``.
        StorageError: ``out`` cannot be written, or the disk is full; what was finished is intact.
    """
    if not 0 <= worker < num_workers:
        raise UsageError(f"there is no worker {worker} among {num_workers}", fix="workers are numbered from 0")
    if out is None and num_workers > 1:
        raise UsageError("several workers need a common folder", fix="give out=")
    whole = as_pool(pool)
    check_model(model, whole)
    settings = sized(
        norm,
        mode,
        device_of(model).type,
        steps=steps,
        batch_size=batch_size,
        chunk=chunk,
        part_rows=part_rows,
        precision=precision,
        compile=compile,
    )
    meta = settings.meta(model, whole)
    if out is None:
        with Progress("margins", len(whole), "images", show=progress) as bar:
            columns = score_rows(model, whole, 0, len(whole), settings, bar.advance)
        return table_of(columns, meta)
    folder = PartFolder(out, meta, environment(device_of(model)))
    with folder.held(worker, num_workers):
        score_parts(model, whole, folder, settings, share(folder.count, worker, num_workers), progress)
    if num_workers > 1 and not all(folder.finished(part) for part in range(folder.count)):
        return None
    return MarginTable.read(out)


def score_parts(
    model: nn.Module,
    pool: Pool,
    folder: PartFolder,
    settings: ScoringSettings,
    parts: Sequence[int],
    progress: bool = False,
) -> list[int]:
    """Score those of ``parts`` that are not finished yet; return them."""
    missing = [part for part in parts if not folder.finished(part)]
    sizes = {part: int(np.diff(folder.bounds(part))[0]) for part in parts}
    ready = sum(sizes.values()) - sum(sizes[part] for part in missing)
    with Progress("margins", sum(sizes.values()), "images", show=progress, done=ready) as bar:
        for part in missing:
            folder.write(part, score_rows(model, pool, *folder.bounds(part), settings, bar.advance))
    return missing


def table_of(columns: Columns, meta: dict[str, Any]) -> MarginTable:
    """The table of a whole pool's columns."""
    return MarginTable(
        label=columns["label"],
        predicted=columns["predicted"],
        margin=columns["margin"],
        status=columns["status"],
        steps=columns["steps"],
        source=columns["source"],
        meta=meta,
    )


def as_pool(pool: Pool | Source) -> Pool:
    """A single source as a pool of its own."""
    return pool if isinstance(pool, Pool) else Pool([pool])
