"""`score_margins`: the margins of a pool, streamed part by part, in memory or in a folder that resumes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma.attacks.deepfool import Mode, Precision, deepfool, require_known
from puma.data.pool import Pool, read_batch
from puma.data.source import Source
from puma.devices import warn_slow_bf16
from puma.errors import UsageError, integer, number
from puma.io import spans
from puma.margins import PART_ROWS, Columns, MarginTable
from puma.models.checks import device_of
from puma.progress import Progress
from puma.scoring.parts import Done, Rows, TableParts, checked_pool, pool_columns, table_meta
from puma.threat import Norm, parse_norm


@dataclass(frozen=True)
class ScoringSettings:
    """Everything but the model and the pool that decides the bytes of a margin table; arguments as in `score_margins`.

    Batches have fixed boundaries in a part; ``chunk`` images are passed at once. `UsageError` for what cannot be used.
    """

    norm: Norm = "Linf"
    mode: Mode = "refined"
    refine_below: float | None = None
    steps: int = 50
    batch_size: int = 512
    chunk: int = 64
    part_rows: int = PART_ROWS
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        parse_norm(self.norm)
        require_known(self.mode, self.precision)
        for name in ("steps", "batch_size", "chunk", "part_rows"):
            object.__setattr__(self, name, integer(name, getattr(self, name), low=1))
        if self.refine_below is not None:
            object.__setattr__(self, "refine_below", number("refine_below", self.refine_below, open_low=True))
            if self.mode == "fast":
                raise UsageError("refine_below needs a mode that searches", why="mode fast is what it estimates with")

    @classmethod
    def sized(cls, device: torch.device, *, batch_size: int | None = None, **settings: Any) -> ScoringSettings:
        """Settings with sizes that suit the device: 64 images a pass stay in a CPU's cache, a GPU needs many more."""
        batch, chunk = (4096, 1024) if device.type == "cuda" else (512, 64)
        size = batch_size or batch
        return cls(batch_size=size, chunk=min(chunk, size), **settings)

    def meta(self, models: Sequence[nn.Module], pool: Pool) -> dict[str, Any]:
        """The metadata of the table that the one model of ``models`` gives."""
        settings = asdict(self)
        return table_meta(settings.pop("mode"), settings.pop("norm"), settings, pool, *models)

    def score_rows(self, models: Sequence[nn.Module], pool: Pool, rows: Rows, done: Done) -> Columns:
        """The columns of some rows of a pool; ``done`` is called with the number of images that are finished.

        Batches are all of one size, the last filled up with its last image: bytes do not depend on how many remain.
        """
        first = self if self.refine_below is None else replace(self, mode="fast", refine_below=None)
        (model,), rows = models, np.asarray(rows, dtype=np.int64)
        columns, postponed = Columns(), 0
        for span in spans(len(rows), self.batch_size):
            batch = first.score_batch(model, pool, rows[span], fill=len(rows) > len(span))
            if not columns:  # batches kept to the end would leave small arrays all over the heap: 1.7 KB an image
                columns = {name: np.empty(len(rows), values.dtype) for name, values in batch.items()}
            for name, values in batch.items():
                columns[name][span.start : span.stop] = values
            later = int(np.count_nonzero(self._to_refine(batch)))
            postponed += later
            done(len(span) - later)
        places = np.flatnonzero(self._to_refine(columns)) if postponed else np.arange(0)
        for span in spans(len(places), self.batch_size):
            refined = self.score_batch(model, pool, rows[places[span]])
            for name in ("predicted", "margin", "status", "steps"):
                columns[name][places[span]] = refined[name]
            done(len(span))
        return columns

    def score_batch(self, model: nn.Module, pool: Pool, rows: NDArray[np.int64], fill: bool = False) -> Columns:
        """The columns of ``rows``; with ``fill`` the last row is repeated up to the batch size, and not returned."""
        count = len(rows)
        full = np.pad(rows, (0, self.batch_size - count), mode="edge") if fill else rows
        images, labels = read_batch(pool, full, device_of(model))
        options: dict[str, Any] = {key: getattr(self, key) for key in ("norm", "mode", "steps", "chunk", "precision")}
        hit = deepfool(model, images, labels, proxy=_compiled(model) if self.compile else None, **options)
        return pool_columns(pool, rows) | {
            "predicted": hit.predicted[:count].cpu().numpy().astype(np.int16),
            "margin": hit.margin[:count].cpu().numpy().astype(np.float32),
            "status": hit.codes[:count].cpu().numpy(),
            "steps": hit.steps[:count].cpu().numpy(),
        }

    def _to_refine(self, columns: Columns) -> NDArray[np.bool_]:
        """bool ``[rows]``: estimates below ``refine_below``, negative ones included, and rows without an estimate."""
        if self.refine_below is None:
            return np.zeros(len(columns["margin"]), dtype=bool)
        return np.asarray(~(columns["margin"] >= np.float32(self.refine_below)))


@lru_cache(maxsize=1)
def _compiled(model: nn.Module) -> nn.Module:
    """The compiled model, made once for a process; shapes are fixed, a batch is filled up to one of a few."""
    return cast(nn.Module, torch.compile(model, dynamic=False))


def score_margins(
    model: nn.Module,
    pool: Pool | Source,
    *,
    norm: Norm = "Linf",
    mode: Mode = "refined",
    refine_below: float | None = None,
    out: Path | str | None = None,
    steps: int = 50,
    batch_size: int | None = None,
    part_rows: int = PART_ROWS,
    precision: Precision = "float32",
    compile: bool = False,
    progress: bool = False,
) -> MarginTable:
    """Measure the margin of every image of a pool.

    Args:
        model: the margin model, in eval mode, on the device to use; it is not changed.
        pool: a `Pool`, or one source.
        norm, mode, steps: as in `puma.deepfool`.
        refine_below: estimate every margin to first order (mode ``fast``) and run ``mode`` only on images whose
            estimate is below this, in pixel units; the others keep status ``estimated``. Twice the eps of the training
            to come is a good choice. None: run ``mode`` on every image.
        out: folder of the table, in parts of ``part_rows``; those finished there are kept. None: memory only.
        batch_size: images searched together; default 512, or 4096 on a GPU.
        precision: ``"bf16"`` computes gradients in bfloat16; crossings are confirmed in float32 either way.
        compile: search with ``torch.compile``'s version of the model; crossings are confirmed by ``model`` itself.

    Raises:
        UsageError: unknown norm, mode or precision; a size below 1.
        DataError: an empty pool, or classes that are not numbered as the model's.
        ModelError: a model in training mode, or whose logits depend on the batch.
        ResumeError: ``out`` holds another table, or a live process is writing it.
    """
    chosen: dict[str, Any] = {"norm": norm, "mode": mode, "refine_below": refine_below, "steps": steps}
    chosen |= {"batch_size": batch_size, "part_rows": part_rows, "precision": precision, "compile": compile}
    settings = ScoringSettings.sized(device_of(model), **chosen)
    pool = checked_pool(model, pool)
    warn_slow_bf16(precision, device_of(model))
    if out is not None:
        return TableParts(out, settings, [model], pool).make_all(progress)
    with Progress("margins", len(pool), "images", show=progress) as bar:
        columns = settings.score_rows([model], pool, range(len(pool)), bar.advance)
    del columns["index"]
    return MarginTable(**columns, meta=settings.meta([model], pool))  # type: ignore[arg-type]  # exactly its fields
