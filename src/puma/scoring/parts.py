"""The folder of a score table: parts that any process computes in any order, each complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma.data.checks import match_classes
from puma.data.pool import Pool, read_batch
from puma.data.source import Source
from puma.devices import environment
from puma.errors import DataError
from puma.io import Shards, fingerprint, require_same_settings, spans
from puma.margins import SCHEMA_VERSION, Columns, read_header, read_part, write_part
from puma.models import checks
from puma.models.modes import device_of
from puma.models.weights import unwrap, weights_sha256
from puma.progress import Progress

Result = TypeVar("Result")
Compute = Callable[[range, Callable[[int], None]], Columns]
"""From rows of the pool to their columns; the second argument is called with the number of rows as they are done."""


class TableParts(Shards):
    """The parts of a margin table, or of a table of other scores.

    Args:
        out: folder of the table.
        meta: the table's metadata, as in `puma.margins.MarginTable`; its settings hold ``part_rows``.
        device: where the work is done; recorded, and named where it differs later.
        write: False only looks at what is there, and changes nothing.

    Raises:
        ResumeError: the folder holds a table made with other settings; both values are named.
        StorageError: it cannot be written.
    """

    def __init__(self, out: Path | str, meta: Mapping[str, Any], device: torch.device, *, write: bool = True) -> None:
        self.meta = dict(meta)
        rows = sum(source["rows"] for source in meta["pool"]["sources"])
        self.ranges = spans(rows, meta["settings"]["part_rows"])
        super().__init__(
            out,
            self.meta,
            environment=environment(device),
            record="table.json",
            schema=SCHEMA_VERSION,
            check=self._is_part,
            write=write,
        )

    def make(self, numbers: Iterable[int], compute: Compute, progress: bool = False) -> None:
        """Compute and write those parts, among ``numbers``, that are not finished."""
        label = f"scores ({self.meta['mode']})"
        make_missing(self, {number: self.ranges[number] for number in numbers}, compute, self.write, label, progress)

    def write(self, number: int, columns: Columns) -> None:
        """Write one part; it appears whole or not at all."""
        with self.writing(number) as temporary:
            write_part(temporary, columns, self.meta)

    def finished(self, key: int | str) -> bool:
        """Whether a part is there, whole, and of this table.

        Raises:
            ResumeError: a part of another table lies at its place.
        """
        if not super().finished(key):
            return False
        require_same_settings(self.path(key), read_header(self.path(key))[0], self.meta)
        return True

    def all_finished(self) -> bool:
        """Whether every part of the table is there."""
        return not self.missing(range(len(self.ranges)))

    def _is_part(self, path: Path) -> bool:
        """For parts that were copied without their checksum file: they hold checksums of their own."""
        try:
            index = read_part(path)["index"]
        except DataError:
            return False
        rows = self.ranges[int(path.stem.removeprefix("part-"))]
        return len(index) == len(rows) and index[0] == rows.start and index[-1] == rows.stop - 1


def make_missing(
    shards: Shards,
    ranges: Mapping[int, range],
    compute: Callable[[range, Callable[[int], None]], Result],
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


def write_array(shards: Shards, number: int, array: NDArray[Any]) -> None:
    """Write one shard as a ``.npy`` file."""
    with shards.writing(number) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def table_meta(mode: str, norm: str, settings: Mapping[str, Any], pool: Pool, *models: nn.Module) -> dict[str, Any]:
    """The metadata of a table made by one model, or by several snapshots of one."""
    config = getattr(models[-1], "config", None)
    name = config.get("name") if isinstance(config, dict) else type(models[-1]).__name__
    digests = [weights_sha256(model) for model in models]
    model = {"name": str(name), "sha256": digests[0] if len(digests) == 1 else fingerprint(digests)}
    return {"norm": norm, "mode": mode, "settings": dict(settings), "model": model, "pool": pool.describe()}


def pool_columns(pool: Pool, rows: NDArray[np.int64]) -> Columns:
    """The columns of a table that are known before anything is computed."""
    labels = pool.labels[rows].astype(np.int16)
    return {"index": rows.astype(np.int64), "label": labels, "source": pool.source.codes[rows]}


def as_pool(pool: Pool | Source) -> Pool:
    """A single source as a pool of its own."""
    return pool if isinstance(pool, Pool) else Pool([pool])


def check_model(model: nn.Module, pool: Pool) -> None:
    """Check a model on the pool's first images (`puma.models.checks.check_model`), before hours are spent on it.

    Raises:
        ModelError: as there.
        DataError: an empty pool, or one whose classes have other names or another order than the model's.
    """
    if not len(pool):
        raise DataError("the pool is empty", why="there is nothing to score")
    names = getattr(unwrap(model), "class_names", None)
    if names and match_classes(pool, names, "the model") is not pool:
        fix = f"order the classes as the model does: ?classes={','.join(names)}"
        raise DataError("the pool numbers its classes otherwise than the model", why="margins need its labels", fix=fix)
    images, _ = read_batch(pool, np.arange(min(64, len(pool))), device_of(model))
    checks.check_model(model, images, pool.num_classes)
