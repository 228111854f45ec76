"""Self-contained pages and their parts: tables, pictures, thumbnails; written as HTML, as files of each part, as PDF.

A page is one file and the same bytes every time. Jinja2 escapes every value; figures are SVG images on white, which
cannot run anything; the content security policy forbids all requests, and all scripts but our own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray
from PIL import Image

from puma import __version__
from puma.errors import UsageError, unknown
from puma.io import atomic_path, prepare_folder, write_bytes, write_text
from puma.plots import GRID, figure_style, svg_text
from puma.tradeoff import Estimate

Kind = Literal["text", "number", "percent", "points"]
"""How a column is shown: text; a number; a fraction as percent; a difference of fractions in signed points."""

FORMATS = ("svg", "pdf", "csv")
_UNITS = {"percent": ", %", "points": ", points"}
_A4 = (8.27, 11.69)


@dataclass
class Table:
    """Rows under named columns; columns that are None in every row are left out.

    ``columns`` is head -> kind. A cell is text, a number, an `Estimate` (a value with its interval) or None. Fractions
    stay fractions in CSV; the page shows them in percent.

    >>> table = Table({"strategy": "text", "clean": "percent"}, [["puma", Estimate(0.853, 0.845, 0.861, 3)]])
    >>> table.heads, table.shown
    (['strategy', 'clean, %'], [['puma', '85.3 ±0.8']])
    """

    columns: Mapping[str, Kind]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        if self.rows:
            used = [any(cell is not None for cell in cells) for cells in zip(*self.rows, strict=True)]
            self.columns = dict(compress(self.columns.items(), used))
            self.rows = [list(compress(row, used)) for row in self.rows]

    @property
    def heads(self) -> list[str]:
        """Heads of the columns with their units."""
        return [head + _UNITS.get(kind, "") for head, kind in self.columns.items()]

    @property
    def shown(self) -> list[list[str]]:
        """Every cell as a person reads it."""
        return [[show(cell, kind) for cell, kind in zip(row, self.columns.values(), strict=True)] for row in self.rows]

    def frame(self) -> pd.DataFrame:
        """The table at full precision; the ends of an interval are two more columns."""
        columns: dict[str, list[Any]] = {}
        for place, head in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            columns[head] = [number(cell, cell) for cell in cells]
            if any(getattr(cell, "low", None) is not None for cell in cells):
                columns |= {f"{head}, {end}": [getattr(cell, end, None) for cell in cells] for end in ("low", "high")}
        return pd.DataFrame(columns, dtype=object)

    def csv(self) -> str:
        """The table as CSV, numbers at full precision."""
        return str(self.frame().to_csv(index=False, lineterminator="\n")).replace("`", "")


def number(cell: Any, otherwise: Any = None) -> Any:
    """The number in a cell, ``otherwise`` where it holds none."""
    value = cell.value if isinstance(cell, Estimate) else cell
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def rounded(value: float) -> float:
    """The number with three significant digits."""
    return float(f"{value:.3g}")


def show(cell: Any, kind: Kind = "number") -> str:
    """A cell as a person reads it.

    >>> show(Estimate(0.041, 0.032, 0.050, 5), "points"), show(Estimate(0.02, 0.0, 0.07, 1), "percent"), show(None)
    ('+4.1 ±0.9', '2.0 [0.0, 7.0]', '–')
    >>> show(1200), show(0.95312), show("puma", "percent")
    ('1,200', '0.9531', 'puma')
    """

    def hundredfold(fraction: float) -> str:
        text = f"{100 * fraction:+.1f}" if kind == "points" else f"{100 * fraction:.1f}"
        return "0.0" if float(text) == 0 else text.replace("-", "−")

    value = number(cell)
    if value is None or not math.isfinite(value):
        return "–" if cell is None or value is not None else str(cell)
    if kind not in _UNITS:
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if not isinstance(cell, Estimate) or cell.low is None or cell.high is None:
        return hundredfold(value)
    if abs(2 * value - cell.low - cell.high) < 5e-4:
        return f"{hundredfold(value)} ±{50 * (cell.high - cell.low):.1f}"
    return f"{hundredfold(value)} [{hundredfold(cell.low)}, {hundredfold(cell.high)}]"


def points(estimate: Estimate | None, of: str) -> str:
    """A difference in percentage points with its interval.

    >>> points(Estimate(0.041, 0.032, 0.050, 5), "clean"), points(None, "clean")
    ('clean +4.1 points [+3.2, +5.0]', 'clean: not known')
    """
    if estimate is None:
        return f"{of}: not known"
    low, high = (show(end, "points") for end in (estimate.low, estimate.high))
    ends = "" if estimate.low is None or estimate.high is None else f" [{low}, {high}]"
    return f"{of} {show(estimate.value, 'points')} points{ends}"


@dataclass(frozen=True)
class Picture:
    """A figure for a page, with a text for somebody who cannot see it."""

    figure: Figure
    alt: str

    @cached_property
    def svg(self) -> str:
        """The figure as SVG; rendered once, as a second rendering may place ticks otherwise."""
        return svg_text(self.figure)

    @property
    def uri(self) -> str:
        """The figure as a ``data:`` address."""
        return _uri("image/svg+xml", self.svg.encode())

    @property
    def width(self) -> int:
        """Widest that it is shown, in CSS pixels."""
        return round(float(self.figure.get_figwidth()) * 144)


def png_uri(image: NDArray[np.uint8]) -> str:
    """An image, uint8 ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``, as a ``data:`` address, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image).save(buffer, format="PNG", optimize=True)
    return _uri("image/png", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@dataclass
class Report:
    """What a page shows: pictures and tables by the names of their exported files, and what else its template uses."""

    template: str
    title: str
    pictures: dict[str, Picture] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Report {self.title}: pictures {', '.join(self.pictures)}; tables {', '.join(self.tables)}>"

    def html(self) -> str:
        """The page."""
        values = {"title": self.title, "pictures": self.pictures, "tables": self.tables} | self.values
        return _environment().get_template(self.template).render(values) + "\n"

    def write(self, path: Path | str) -> Path:
        """Write the page and return its path; `StorageError` if that cannot be."""
        write_text(path, self.html())
        return Path(path)


@cache
def _environment() -> Environment:
    options: Any = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("puma.report"), **options)
    script = files("puma.report").joinpath("templates/page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(version=__version__, script=Markup(script), script_digest=digest)
    environment.filters.update(inline=_inline, flatten=flatten, show=show, number=number)
    return environment


def _inline(text: str) -> Markup:
    """Escaped text in which what stands between backticks is set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values of settings; nested ones are named ``outer.inner``.

    >>> flatten({"a": {"b": 1}, "c": [1, 2], "d": None})
    [('a.b', '1'), ('c', '1, 2'), ('d', 'none')]
    """
    items: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            items += flatten(value, f"{prefix}{name}.")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            items.append((f"{prefix}{name}", ", ".join("none" if v is None else str(v) for v in values) or "none"))
    return items


def export(report: Report, formats: Sequence[str], folder: Path | str) -> list[Path]:
    """Write every figure (``svg``, ``pdf``) or table (``csv``, at full precision) into ``folder``; return the files.

    Equal reports give equal bytes. An unknown format is a UsageError, before anything is written.
    """
    check_formats(formats)
    folder, written = prepare_folder(folder), []
    for kind in dict.fromkeys(formats):
        contents = {name: table.csv().encode() for name, table in report.tables.items()} if kind == "csv" else {}
        for name, picture in report.pictures.items() if kind != "csv" else ():
            contents[name] = picture.svg.encode() if kind == "svg" else _rendered(picture.figure, "pdf")
        for name, content in contents.items():
            written.append(folder / f"{name}.{kind}")
            write_bytes(written[-1], content)
    return written


def _rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with figure_style():
        figure.savefig(buffer, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None, **options)
    return buffer.getvalue()


def check_formats(formats: Sequence[str]) -> None:
    """Refuse, with a UsageError, formats that are none of `FORMATS`."""
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)


def write_summary(report: Report, path: Path | str) -> Path:
    """Write a PDF of two pages: the verdict with the picture, and the table; `UsageError` if there are none."""
    if "tradeoff" not in report.pictures:
        raise UsageError("only a study with attacked runs has a summary", fix="leave --pdf away, or use --export pdf")
    headline, *others = report.values["verdict"].sentences
    first, second, top = Figure(figsize=_A4), Figure(figsize=_A4), 0.95
    with figure_style(), atomic_path(path) as temporary, PdfPages(temporary, metadata={"CreationDate": None}) as pages:
        for size, text in ((9, report.title), (12, headline), *((9, sentence) for sentence in others)):
            lines = textwrap.wrap(text.replace("`", ""), round(900 / size))
            first.text(0.08, top, "\n".join(lines), fontsize=size, va="top", weight="bold" if size == 12 else "normal")
            top -= (len(lines) * size * 1.25 + 7) / (72 * _A4[1])
        image = imread(io.BytesIO(_rendered(report.pictures["tradeoff"].figure, "png", dpi=300)))
        height = min(0.84 * _A4[0] / _A4[1] * image.shape[0] / image.shape[1], top - 0.03)
        axes = first.add_axes((0.08, top - height, 0.84, height))
        axes.imshow(image)
        axes.axis("off")
        pages.savefig(first)
        axes, table = second.add_axes((0.05, 0.05, 0.9, 0.9)), report.tables["strategies"]
        axes.axis("off")
        heads = [textwrap.fill(head, 14) for head in table.heads]
        drawn = axes.table(table.shown, colLabels=heads, loc="upper center", cellLoc="right", edges="horizontal")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(7)
        drawn.auto_set_column_width(range(len(heads)))
        for (row, _), cell in drawn.get_celld().items():
            cell.set(height=0.055 if row == 0 else 0.02, edgecolor=GRID)
        pages.savefig(second)
    return Path(path)
