"""Bytes of single rows of a Parquet column, however large the file is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puma.data.images import Rows
from puma.errors import DataError

_CACHE = 512 << 20


class ColumnBytes:
    """The bytes of a binary column (or of the ``bytes`` of a struct column), read by row group as they are asked for.

    The row groups read last stay in memory, up to 512 MiB. Random rows of a larger column therefore read whole row
    groups again and again: for training, `puma data unpack` such a file.

    Args:
        path: the Parquet file.
        column: the column's name.
        checksums: compare the checksums of pages, where the file has them.
    """

    def __init__(self, path: Path, column: str, *, checksums: bool = False) -> None:
        self.path, self.column, self._checksums = path, column, checksums
        self._open()

    def _open(self) -> None:
        self._file = pq.ParquetFile(self.path, page_checksum_verification=self._checksums)
        groups = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._groups: OrderedDict[int, pa.Array] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __call__(self, rows: Rows) -> list[Any]:
        """The bytes at ``rows``, in their order.

        Raises:
            DataError: a damaged row group, or a row without bytes.
        """
        out: list[Any] = [None] * len(rows)
        owner = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(owner):
            group = self._group(int(number))
            start = int(self._ends[number]) - len(group)
            for place in np.flatnonzero(owner == number):
                value = group[int(rows[place]) - start]
                if not value.is_valid:
                    raise DataError(f"{self.path}: {self.column}, row {rows[place]:,} holds no bytes")
                out[place] = value.as_buffer()
        return out

    def _group(self, number: int) -> pa.Array:
        with self._lock:
            if number in self._groups:
                self._groups.move_to_end(number)
                return self._groups[number]
            try:
                column = self._file.read_row_group(number, columns=[self.column]).column(0).combine_chunks()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise DataError(f"{self.path} is damaged in row group {number}", why=str(error)[:200]) from None
            column = bytes_of(column)
            if len(column) != self._file.metadata.row_group(number).num_rows:
                raise DataError(
                    f"{self.path} is damaged in row group {number}",
                    why=f"it holds {len(column):,} rows, not what it says",
                )
            self._held += column.nbytes
            self._groups[number] = column
            while self._held > _CACHE and len(self._groups) > 1:
                self._held -= self._groups.popitem(last=False)[1].nbytes
            return column

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "column": self.column, "_checksums": self._checksums}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def bytes_of(column: pa.Array) -> pa.Array:
    """The binary values of a binary column or of a ``{bytes, path}`` struct column."""
    return column.field("bytes") if pa.types.is_struct(column.type) else column
