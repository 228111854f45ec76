"""A report's figures as SVG or PDF and its tables as CSV or LaTeX, one file each."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from puma.errors import unknown
from puma.io import prepare_folder, write_bytes, write_text
from puma.report.cells import Value, format_number, is_numeric
from puma.report.content import Picture, Report, Table
from puma.report.style import house_style
from puma.report.svg import svg_text

Format = Literal["svg", "pdf", "csv", "latex"]
FORMATS: tuple[Format, ...] = ("svg", "pdf", "csv", "latex")
_ENDINGS = {"svg": "svg", "pdf": "pdf", "csv": "csv", "latex": "tex"}
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "–": "--", "−": "$-$",
        "→": r"$\rightarrow$", "≥": r"$\geq$", "≤": r"$\leq$", "<": r"\textless{}", ">": r"\textgreater{}",
    }
)  # fmt: skip


def export(report: Report, formats: Sequence[str], folder: Path | str) -> list[Path]:
    """Write every figure (``svg``, ``pdf``) or table (``csv``, ``latex``) of a report into ``folder``.

    Equal reports give equal bytes. CSV holds full precision; LaTeX the figures as the page shows them, in a
    ``tabular`` that needs the package booktabs.

    Returns:
        the files, in order.

    Raises:
        UsageError: an unknown format.
        StorageError: the folder cannot be written.
    """
    formats = check_formats(formats)
    folder = prepare_folder(folder)
    written = []
    for name in formats:
        for item in report.pictures if name in ("svg", "pdf") else report.tables:
            target = folder / f"{item.name}.{_ENDINGS[name]}"
            _write(item, name, target)
            written.append(target)
    return written


def check_formats(formats: Sequence[str]) -> list[str]:
    """The formats, each once; ``"tex"`` is understood as ``"latex"``.

    Raises:
        UsageError: an unknown format.
    """
    known = ["latex" if name == "tex" else name for name in dict.fromkeys(formats)]
    for name in known:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    return list(dict.fromkeys(known))


def csv_text(table: Table) -> str:
    """A table as CSV: plain numbers at full precision, empty where there is none; intervals as two more columns."""
    ranged = [
        any(isinstance(row[i], Value) and row[i].low is not None for row in table.rows)
        for i in range(len(table.columns))
    ]
    heads = [
        name
        for column, has_interval in zip(map(_plain, table.columns), ranged, strict=True)
        for name in ([column, f"{column}, low", f"{column}, high"] if has_interval else [column])
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    for row in table.rows:
        cells: list[Any] = []
        for cell, has_interval in zip(row, ranged, strict=True):
            cells.append(_csv_cell(cell))
            if has_interval:
                cells += [cell.low, cell.high] if isinstance(cell, Value) else [None, None]
        writer.writerow(cells)
    return buffer.getvalue()


def latex_text(table: Table) -> str:
    r"""A table as a LaTeX ``tabular`` with the rules of booktabs.

    >>> print(latex_text(Table("t", ["strategy", "clean"], [["puma_plus", 0.95]], "")))
    % \usepackage{booktabs}
    \begin{tabular}{lr}
    \toprule
    strategy & clean \\
    \midrule
    puma\_plus & 0.95 \\
    \bottomrule
    \end{tabular}
    <BLANKLINE>
    """
    kinds = "".join("r" if is_numeric([row[i] for row in table.rows]) else "l" for i in range(len(table.columns)))
    lines = [" & ".join(_escape(name) for name in table.columns)]
    lines += [" & ".join(_escape(_shown(cell)) for cell in row) for row in table.rows]
    head, body = lines[0], "".join(f"{line} \\\\\n" for line in lines[1:])
    caption = f"% {_plain(table.caption)}\n" if table.caption else ""
    return (
        f"{caption}% \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{kinds}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}"
        "\\bottomrule\n\\end{tabular}\n"
    )


def _write(item: Picture | Table, name: str, target: Path) -> None:
    if isinstance(item, Table):
        write_text(target, csv_text(item) if name == "csv" else latex_text(item))
    elif name == "svg":
        write_text(target, svg_text(item.figure))
    else:
        buffer = io.BytesIO()
        with house_style():
            item.figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
        write_bytes(target, buffer.getvalue())


def _csv_cell(cell: Any) -> Any:
    if isinstance(cell, Value):
        return _plain(cell.text).replace("–", "") if cell.number is None else cell.number
    return "" if cell is None else _plain(cell) if isinstance(cell, str) else cell


def _shown(cell: Any) -> str:
    if isinstance(cell, Value):
        return cell.text
    if cell is None:
        return "–"
    return str(cell) if isinstance(cell, str | bool) else format_number(cell)


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def _escape(text: str) -> str:
    return _plain(text).translate(_LATEX)
