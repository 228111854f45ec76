"""Tables of a report: one set of rows, shown on a page in percent, exported as CSV or LaTeX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from puma.errors import UsageError
from puma.tradeoff import Estimate

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["text", "number", "percent", "points"]
"""How a column is shown: text; a number; a fraction as percent; a difference of fractions in signed points."""

_UNITS = {"percent": ", %", "points": ", points"}


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    A cell is text, a number, an `Estimate` (a value with its interval) or None. Fractions stay fractions in CSV; the
    page and LaTeX show them in percent.

    Args:
        columns: head -> kind.
        rows: one cell per column.

    >>> table = Table({"strategy": "text", "clean": "percent"}, [["puma", Estimate(0.853, 0.845, 0.861, 3)]])
    >>> table.heads, table.shown
    (['strategy', 'clean, %'], [['puma', '85.3 ±0.8']])

    Raises:
        UsageError: a row of another length than ``columns``.
    """

    columns: Mapping[str, Kind]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UsageError(f"a table row has {len(row)} cells, its head has {len(self.columns)}")

    @property
    def heads(self) -> list[str]:
        """Heads of the columns with their units."""
        return [head + _UNITS.get(kind, "") for head, kind in self.columns.items()]

    @property
    def shown(self) -> list[list[str]]:
        """Every cell as a person reads it."""
        kinds = list(self.columns.values())
        return [[show(cell, kind) for cell, kind in zip(row, kinds, strict=True)] for row in self.rows]

    def without_empty_columns(self) -> Table:
        """The table without the columns that are None in every row."""
        used = [i for i in range(len(self.columns)) if not self.rows or any(row[i] is not None for row in self.rows)]
        heads = list(self.columns)
        return Table({heads[i]: self.columns[heads[i]] for i in used}, [[r[i] for i in used] for r in self.rows])

    def frame(self) -> pd.DataFrame:
        """The table at full precision; the ends of an interval are two more columns."""
        import pandas as pd

        columns: dict[str, list[Any]] = {}
        for head, cells in zip(self.columns, zip(*self.rows, strict=True), strict=False):
            columns[head] = [number(cell, cell) for cell in cells]
            if any(isinstance(cell, Estimate) and cell.low is not None for cell in cells):
                for end in ("low", "high"):
                    columns[f"{head}, {end}"] = [getattr(cell, end, None) for cell in cells]
        return pd.DataFrame(columns, columns=None if self.rows else list(self.columns), dtype=object)

    def csv(self) -> str:
        """The table as CSV, numbers at full precision."""
        return str(self.frame().to_csv(index=False, lineterminator="\n")).replace("`", "")

    def latex(self) -> str:
        r"""The table as a LaTeX ``tabular`` with the rules of the package booktabs."""
        import pandas as pd

        frame = pd.DataFrame(self.shown, columns=self.heads)
        kinds = "".join("l" if kind == "text" else "r" for kind in self.columns.values())
        body = str(frame.to_latex(index=False, escape=True, column_format=kinds))
        return "% \\usepackage{booktabs}\n" + body.replace("−", "$-$").replace("–", "--").replace("`", "")


def number(cell: Any, otherwise: Any = None) -> Any:
    """The number in a cell, ``otherwise`` where it holds none."""
    value = cell.value if isinstance(cell, Estimate) else cell
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def show(cell: Any, kind: Kind = "number") -> str:
    """A cell as text.

    >>> show(Estimate(0.041, 0.032, 0.050, 5), "points"), show(Estimate(0.02, 0.0, 0.07, 1), "percent"), show(None)
    ('+4.1 ±0.9', '2.0 [0.0, 7.0]', '–')
    >>> show(1200), show(0.95312), show("puma", "percent")
    ('1,200', '0.9531', 'puma')
    """
    value = number(cell)
    if value is None or not math.isfinite(value):
        return "–" if cell is None or value is not None else str(cell)
    if kind not in _UNITS:
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if not isinstance(cell, Estimate) or cell.low is None or cell.high is None:
        return _hundredfold(value, kind)
    if abs(2 * value - cell.low - cell.high) < 5e-4:
        return f"{_hundredfold(value, kind)} ±{50 * (cell.high - cell.low):.1f}"
    return f"{_hundredfold(value, kind)} [{_hundredfold(cell.low, kind)}, {_hundredfold(cell.high, kind)}]"


def _hundredfold(value: float, kind: Kind) -> str:
    text = f"{100 * value:+.1f}" if kind == "points" else f"{100 * value:.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")
