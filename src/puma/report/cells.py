"""Cells of a table and other text on a page: how numbers read, how they sort, and escaping."""

from __future__ import annotations

import html
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Value:
    """A table cell that is shown as ``text`` and sorted by ``number`` (None sorts last).

    ``low`` and ``high`` are the ends of its interval; ``text`` shows them rounded, CSV in columns of their own.
    """

    number: float | None
    text: str
    low: float | None = None
    high: float | None = None


def format_number(value: float) -> str:
    """A number for people: whole ones in full, others with four digits.

    >>> [format_number(x) for x in (1200, 0.95312, 1e-7, float("nan"))]
    ['1,200', '0.9531', '1e-07', 'NaN']
    """
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if math.isnan(value):
        return "NaN"
    return f"{value:.4g}" if abs(value) < 10_000 or math.isinf(value) else f"{value:,.0f}"


def _is_number(cell: Any) -> bool:
    return isinstance(cell, numbers.Real) and not isinstance(cell, bool | np.bool_)


def is_numeric(cells: Sequence[Any]) -> bool:
    """Whether a column holds numbers only (or `Value`), at least one, besides empty cells."""
    given = [cell for cell in cells if cell is not None]
    return bool(given) and all(isinstance(cell, Value) or _is_number(cell) for cell in given)


def decimals_of(cells: Sequence[Any]) -> int | None:
    """Decimals that show a column of floats evenly: four digits of the largest; None where that hides the smallest."""
    sizes = [abs(float(cell)) for cell in cells if isinstance(cell, float | np.floating) and math.isfinite(cell)]
    sizes = [size for size in sizes if size > 0]
    if not sizes:
        return None
    decimals = max(0, 3 - math.floor(math.log10(max(sizes))))
    return decimals if min(sizes) >= 10.0**-decimals and decimals <= 6 else None


def cell_html(cell: Any, kind: str, decimals: int | None) -> str:
    """One ``<td>``; numbers carry their full value for sorting and for CSV."""
    if cell is None:
        return f'<td class="{kind}" data-value="">–</td>'
    if isinstance(cell, Value):
        key = "" if cell.number is None else repr(float(cell.number))
        return f'<td class="{kind}" data-value="{key}">{inline(cell.text)}</td>'
    if isinstance(cell, int | np.integer) and not isinstance(cell, bool):
        return f'<td class="{kind}" data-value="{int(cell)}">{format_number(int(cell))}</td>'
    if _is_number(cell):
        text = format_number(cell) if decimals is None or not math.isfinite(cell) else f"{cell:,.{decimals}f}"
        return f'<td class="{kind}" data-value="{float(cell)!r}">{text}</td>'
    return f'<td class="{kind}">{inline(str(cell))}</td>'


def escape(text: str) -> str:
    """Text as HTML shows it literally, also inside an attribute."""
    return html.escape(str(text), quote=True)


def inline(text: str) -> str:
    """Escaped text in which what stands between backticks is set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
