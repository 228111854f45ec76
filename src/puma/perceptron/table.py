"""The table a simulation returns: named columns, one row per trained student."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError
from puma.io import write_text

if TYPE_CHECKING:
    import pandas as pd


class Mean(NamedTuple):
    """A value averaged over seeds, along one axis."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    """Standard error of the mean; NaN for a single seed."""


class Table:
    """Columns of equal length by name.

    >>> table = Table.of([{"seed": 0, "error": 0.25}, {"seed": 1, "error": 0.75}])
    >>> len(table), table["error"].tolist(), len(table.where(seed=1))
    (2, [0.25, 0.75], 1)
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        if len({len(column) for column in columns.values()}) > 1:
            raise DataError("the columns of a table differ in length")
        self.columns = dict(columns)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Table:
        """The table of these rows, which share their keys; None becomes NaN."""
        rows = list(rows)
        names = list(rows[0]) if rows else []
        return cls({name: _column([row[name] for row in rows]) for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*(column.tolist() for column in self.columns.values()), strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def where(self, **equal: Any) -> Table:
        """The rows in which each named column equals the value (numbers to 1e-9)."""
        chosen = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            column = self.columns[name]
            chosen &= np.isclose(column, value, rtol=0, atol=1e-9) if column.dtype.kind == "f" else column == value
        return Table({name: column[chosen] for name, column in self.columns.items()})

    def values(self, name: str) -> list[Any]:
        """The distinct values of a column, ascending."""
        return [value.item() for value in np.unique(self.columns[name])]

    def mean(self, value: str, over: str) -> Mean:
        """Mean and standard error of ``value`` for each value of ``over``."""
        x = np.unique(self.columns[over])
        groups = [self.columns[value][self.columns[over] == at] for at in x]
        spread = [group.std(ddof=1) / np.sqrt(len(group)) if len(group) > 1 else np.nan for group in groups]
        return Mean(x.astype(np.float64), np.array([group.mean() for group in groups]), np.array(spread))

    def write(self, path: Path | str) -> Path:
        """Write the table as CSV, floats with all their digits."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(zip(*(column.tolist() for column in self.columns.values()), strict=True))
        write_text(path, text.getvalue())
        return Path(path)

    def to_pandas(self) -> pd.DataFrame:
        """The table as a pandas frame (pandas has to be installed)."""
        import pandas as pd

        return pd.DataFrame(self.columns)


def _column(values: list[Any]) -> NDArray[Any]:
    if any(isinstance(value, str) for value in values):
        return np.array(values, dtype=str)
    if all(isinstance(value, bool) for value in values):
        return np.array(values, dtype=bool)
    if all(isinstance(value, int) for value in values):
        return np.array(values, dtype=np.int64)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
