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
        units = {"percent": ", %", "points": ", points"}
        return [head + units.get(kind, "") for head, kind in self.columns.items()]

    @property
    def numeric(self) -> list[bool]:
        """Which columns are aligned and sorted as numbers."""
        return [kind != "text" for kind in self.columns.values()]

    @property
    def shown(self) -> list[list[str]]:
        """Every cell as a person reads it."""
        kinds = list(self.columns.values())
        return [[show(cell, kind) for cell, kind in zip(row, kinds, strict=True)] for row in self.rows]

    @property
    def sort_keys(self) -> list[list[str]]:
        """What each cell is sorted by on the page: the full number, empty where there is none."""
        return [["" if (value := number(cell)) is None else repr(value) for cell in row] for row in self.rows]

    def without_empty_columns(self) -> Table:
        """The table without the columns that are None in every row."""
        used = [i for i in range(len(self.columns)) if not self.rows or any(row[i] is not None for row in self.rows)]
        heads = list(self.columns)
        return Table({heads[i]: self.columns[heads[i]] for i in used}, [[r[i] for i in used] for r in self.rows])

    def frame(self) -> pd.DataFrame:
        """The table at full precision; the ends of an interval are two more columns."""
        import pandas as pd

        columns: dict[str, list[Any]] = {}
        for i, (head, kind) in enumerate(self.columns.items()):
            cells = [row[i] for row in self.rows]
            head = _plain(head)
            columns[head] = [_plain(cell) if kind == "text" else number(cell, cell) for cell in cells]
            if any(isinstance(cell, Estimate) and cell.low is not None for cell in cells):
                for end in ("low", "high"):
                    columns[f"{head}, {end}"] = [
                        getattr(cell, end) if isinstance(cell, Estimate) else None for cell in cells
                    ]
        return pd.DataFrame(columns, dtype=object)

    def csv(self) -> str:
        """The table as CSV, numbers at full precision."""
        text: str = self.frame().to_csv(index=False, lineterminator="\n")
        return text

    def latex(self) -> str:
        r"""The table as a LaTeX ``tabular`` with the rules of the package booktabs."""
        import pandas as pd

        cells = [[_plain(text) for text in row] for row in self.shown]
        frame = pd.DataFrame(cells, columns=[_plain(head) for head in self.heads]).map(_latex)
        frame.columns = pd.Index([_latex(head) for head in frame.columns])
        body: str = frame.to_latex(
            index=False, escape=False, column_format="".join("r" if n else "l" for n in self.numeric)
        )
        return f"% \\usepackage{{booktabs}}\n{body}"


def number(cell: Any, otherwise: Any = None) -> Any:
    """The number in a cell, ``otherwise`` where it holds none."""
    value = cell.value if isinstance(cell, Estimate) else cell
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        return value.item() if isinstance(value, np.generic) else value
    return otherwise


def show(cell: Any, kind: Kind = "number") -> str:
    """A cell as text.

    >>> show(Estimate(0.041, 0.032, 0.050, 5), "points"), show(Estimate(0.02, 0.0, 0.07, 1), "percent"), show(None)
    ('+4.1 ±0.9', '2.0 [0.0, 7.0]', '–')
    >>> show(1200), show(0.95312), show("puma", "percent")
    ('1,200', '0.9531', 'puma')
    """
    if cell is None:
        return "–"
    value = number(cell)
    if value is None:
        return str(cell)
    if kind not in ("percent", "points"):
        return _number_text(value)
    text = _scaled(value, kind)
    if not isinstance(cell, Estimate) or cell.low is None or cell.high is None:
        return text
    below, above = cell.value - cell.low, cell.high - cell.value
    if abs(below - above) < 5e-4:
        return f"{text} ±{100 * (below + above) / 2:.1f}"
    return f"{text} [{_scaled(cell.low, kind)}, {_scaled(cell.high, kind)}]"


def _scaled(value: float, kind: Kind) -> str:
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if kind == "points" else f"{100 * value:.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _number_text(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "NaN"
    return f"{value:.4g}" if abs(value) < 10_000 or math.isinf(value) else f"{value:,.0f}"


def _plain(cell: Any) -> Any:
    return " ".join(cell.replace("`", "").split()) if isinstance(cell, str) else cell


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "–": "--", "−": "$-$",
        "→": r"$\rightarrow$", "<": r"\textless{}", ">": r"\textgreater{}",
    }
)  # fmt: skip


def _latex(text: str) -> str:
    return text.translate(_LATEX)
