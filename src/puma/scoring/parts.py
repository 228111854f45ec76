"""The folder of a score table: parts that any process computes in any order, each complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.data.checks import match_classes
from puma.data.pool import Pool, read_batch
from puma.data.source import Source
from puma.devices import environment
from puma.errors import DataError
from puma.io import Shards, fingerprint, require_same_settings, spans
from puma.margins import SCHEMA_VERSION, Columns, MarginTable, read_header, write_part
from puma.models.checks import check_model, device_of, recorded_logits
from puma.models.networks import config_of
from puma.models.weights import unwrap, weights_sha256
from puma.progress import Progress

Result = TypeVar("Result")
Rows = range | NDArray[np.int64]
Done = Callable[[int], object]  # called with the number of rows that have been finished


class TableParts(Shards):
    """The parts of the table that ``settings`` (of margins, snapshots or labels) gives, in the folder ``out``.

    The device of the models is recorded, and named where it differs later. Without ``write`` nothing is changed.
    `ResumeError` names every setting that differs.
    """

    def __init__(
        self, out: Path | str, settings: Any, models: Sequence[nn.Module], pool: Pool, *, write: bool = True
    ) -> None:
        self.meta: dict[str, Any] = settings.meta(models, pool)
        self.ranges, self._compute = spans(len(pool), settings.part_rows), partial(settings.score_rows, models, pool)
        device = device_of(models[-1])
        made = environment(device) | recorded_logits(models[-1], read_batch(pool, np.arange(1), device)[0])
        super().__init__(out, self.meta, write=write, record="table.json", schema=SCHEMA_VERSION, environment=made)

    def make(self, numbers: Iterable[int], progress: bool = False) -> None:
        """Compute and write those parts, among ``numbers``, that are not finished."""
        ranges, label = {number: self.ranges[number] for number in numbers}, f"scores ({self.meta['mode']})"
        make_missing(self, ranges, self._compute, self.write, label, progress)

    def write(self, number: int, columns: Columns) -> None:
        """Write one part; it appears whole or not at all."""
        with self.writing(number) as temporary:
            write_part(temporary, columns, self.meta)

    def finished(self, key: int | str) -> bool:
        """Whether a part is there and whole; `ResumeError` where one of another table lies at its place."""
        if not super().finished(key):
            return False
        require_same_settings(self.path(key), read_header(self.path(key))[0], self.meta)
        return True

    def make_all(self, progress: bool) -> MarginTable:
        """Make what is not finished, in this process, and read the table."""
        with self.held():
            self.make(range(len(self.ranges)), progress)
        return MarginTable.read(self.folder)


def make_missing(
    shards: Shards,
    ranges: Mapping[int, range],
    compute: Callable[[range, Done], Result],
    write: Callable[[int, Result], None],
    label: str,
    progress: bool,
) -> None:
    """Compute and write the shards of some ranges of rows that are not finished yet, under a bar that counts images."""
    missing = shards.missing(ranges)
    total, left = sum(map(len, ranges.values())), sum(len(ranges[number]) for number in missing)
    with Progress(label, total, "images", show=progress, done=total - left) as bar:
        for number in missing:
            write(number, compute(ranges[number], bar.advance))


def write_arrays(
    shards: Shards,
    pool: Pool,
    ranges: Mapping[int, range],
    compute: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int,
    label: str,
    progress: bool,
) -> None:
    """Write what ``compute`` gives for images float ``[B, C, H, W]``, float32 ``[B, ...]``, as missing .npy shards."""

    @torch.no_grad()
    def computed(part: range, done: Done) -> NDArray[np.float32]:
        batches = []
        for span in spans(len(part), batch_size):
            images, _ = read_batch(pool, np.asarray(part[span.start : span.stop]), device)
            batches.append(compute(images).float().cpu().numpy())
            done(len(span))
        return np.concatenate(batches)

    def write(number: int, array: NDArray[np.float32]) -> None:
        with shards.writing(number) as temporary, temporary.open("wb") as file:
            np.save(file, array)

    make_missing(shards, ranges, computed, write, label, progress)


def table_meta(mode: str, norm: str, settings: Mapping[str, Any], pool: Pool, *models: nn.Module) -> dict[str, Any]:
    """The metadata of a table made by one model, or by several snapshots of one."""
    bare = unwrap(models[-1])
    name = (config_of(bare) or {"name": type(bare).__name__})["name"]
    digests = [weights_sha256(model) for model in models]
    model = {"name": str(name), "sha256": digests[0] if len(digests) == 1 else fingerprint(digests)}
    return {"norm": norm, "mode": mode, "settings": dict(settings), "model": model, "pool": pool.describe()}


def pool_columns(pool: Pool, rows: NDArray[np.int64]) -> Columns:
    """The columns of a table that are known before anything is computed."""
    labels = pool.labels[rows].astype(np.int16)
    return {"index": rows.astype(np.int64), "label": labels, "source": pool.source_number[rows]}


def checked_pool(model: nn.Module, pool: Pool | Source) -> Pool:
    """The pool, or that of a single source; the model is tried on its first images (`check_model`).

    `DataError` for an empty pool, or classes with other names or in another order than the model's.
    """
    pool = pool if isinstance(pool, Pool) else Pool([pool])
    if not len(pool):
        raise DataError("the pool is empty", why="there is nothing to score")
    names = getattr(unwrap(model), "class_names", None)
    if names and match_classes(pool, names, "the model") is not pool:
        order = f"order the classes as the model does: ?classes={','.join(names)}"
        some = f"name a source first that has all classes of the model: {', '.join(names)}"
        fix = order if pool.num_classes == len(names) else some
        raise DataError("the pool numbers its classes otherwise than the model", why="margins need its labels", fix=fix)
    images, _ = read_batch(pool, np.arange(min(64, len(pool))), device_of(model))
    check_model(model, images, pool.num_classes)
    return pool
