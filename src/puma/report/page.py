"""A self-contained HTML page: one file, no request to anywhere, every string escaped, the same bytes every time."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from puma._version import __version__
from puma.errors import UsageError
from puma.io import write_text
from puma.report.cells import Value, cell_html, decimals_of, escape, inline, is_numeric
from puma.report.style import DARK
from puma.report.svg import inline_svg, variable

NoteKind = Literal["info", "warning", "good"]

_WIDE = 10
"""Columns from which on a table is printed small."""

__all__ = ["ImageRow", "NoteKind", "Page", "Value", "png_uri"]


@dataclass(frozen=True)
class ImageRow:
    """One labelled row of a gallery: uint8 images ``[H, W]`` or ``[H, W, C]`` and, if wanted, a note under each."""

    label: str
    images: Sequence[NDArray[np.uint8]]
    notes: Sequence[str] = ()


class Page:
    """Builds one HTML file from top to bottom; the calls return the page, so that they chain.

    The file opens from disk, from a mail or from a CI artefact: style, script, figures and images lie inside it, and
    its content security policy forbids every request. Text between backticks is set as code; everything else is
    escaped, so that the name of a study can do no harm.

    >>> page = Page("A <b>study</b>").section("Result").text("See `results.parquet`.")
    >>> "A &lt;b&gt;study" in page.html(), "<code>results.parquet</code>" in page.html()
    (True, True)
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._contents: list[tuple[str, str]] = []
        self._figures = 0
        self._tables = 0

    def section(self, title: str, intro: str = "") -> Page:
        """Begin a section; it appears in the contents."""
        anchor = f"s{len(self._contents) + 1}"
        close = "</section>\n" if self._contents else ""
        self._contents.append((anchor, title))
        self._parts.append(f'{close}<section id="{anchor}"><h2>{escape(title)}</h2>')
        return self.text(intro) if intro else self

    def subsection(self, title: str, intro: str = "") -> Page:
        """Begin a part of a section; not in the contents."""
        self._parts.append(f"<h3>{escape(title)}</h3>")
        return self.text(intro) if intro else self

    def text(self, paragraphs: str | Sequence[str]) -> Page:
        """One paragraph or several."""
        for paragraph in [paragraphs] if isinstance(paragraphs, str) else paragraphs:
            self._parts.append(f"<p>{inline(paragraph)}</p>")
        return self

    def note(self, kind: NoteKind, text: str) -> Page:
        """A remark set apart: ``"info"``, ``"warning"`` or ``"good"``."""
        self._parts.append(f'<p class="note {kind}" role="note">{inline(text)}</p>')
        return self

    def code(self, text: str) -> Page:
        """A command or a file, shown as it is."""
        self._parts.append(f"<pre><code>{escape(text)}</code></pre>")
        return self

    def figure(self, fig: Figure | str, caption: str, alt: str) -> Page:
        """A matplotlib figure, or the text of an SVG that we made (it is not cleaned).

        Args:
            fig: the figure.
            caption: the sentence under it: what to see in it.
            alt: the same for somebody who cannot see it, with the figures that matter.

        Raises:
            UsageError: no alt text.
        """
        if not alt.strip():
            raise UsageError("a figure has no alt text", fix="say in a sentence what it shows")
        self._figures += 1
        svg = inline_svg(fig, f"f{self._figures}", escape(alt))
        legend = f"<figcaption><b>Figure {self._figures}.</b> {inline(caption)}</figcaption>"
        box = f'<div class="scroll" tabindex="0" role="region" aria-label="figure {self._figures}">{svg}</div>'
        self._parts.append(f"<figure>{box}{legend}</figure>")
        return self

    def images(self, rows: Sequence[ImageRow | tuple[str, Sequence[NDArray[np.uint8]]]], caption: str = "") -> Page:
        """A gallery: each row a label and its images, lossless and enlarged without smoothing.

        Raises:
            UsageError: an image is not uint8 ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``.
        """
        lines = []
        for row in rows:
            row = row if isinstance(row, ImageRow) else ImageRow(*row)
            notes = [*row.notes, *[""] * (len(row.images) - len(row.notes))]
            tiles = "".join(_tile(image, row.label, note) for image, note in zip(row.images, notes, strict=True))
            lines.append(
                f'<div class="row"><div class="label">{escape(row.label)}</div><div class="tiles">{tiles}</div></div>'
            )
        legend = f"<figcaption>{inline(caption)}</figcaption>" if caption else ""
        self._parts.append(f'<figure class="gallery">{"".join(lines)}{legend}</figure>')
        return self

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Page:
        """A table that sorts by a click on its head; numbers to the right; offered as CSV.

        Args:
            columns: heads.
            rows: cells: text, numbers, None (shown as an en dash), or `Value` for text that sorts as a number.
            caption: what it shows; may be empty.

        Raises:
            UsageError: a row of another length than ``columns``.
        """
        wrong = [row for row in rows if len(row) != len(columns)]
        if wrong:
            raise UsageError(f"a table row has {len(wrong[0])} cells, its head has {len(columns)}")
        self._tables += 1
        numeric = [is_numeric([row[i] for row in rows]) for i in range(len(columns))]
        kinds = ["number" if flag else "text" for flag in numeric]
        head = "".join(
            f'<th scope="col" class="{kind}"><button type="button">{inline(name)}</button></th>'
            for name, kind in zip(columns, kinds, strict=True)
        )
        decimals = [decimals_of([row[i] for row in rows]) for i in range(len(columns))]
        body = "".join(f"<tr>{''.join(map(cell_html, row, kinds, decimals))}</tr>" for row in rows)
        body = body or f'<tr><td class="text" colspan="{max(len(columns), 1)}">no rows</td></tr>'
        label = f"t{self._tables}"
        legend = f'<p class="caption" id="{label}"><b>Table {self._tables}.</b> {inline(caption)}</p>'
        kind = "table wide" if len(columns) > _WIDE else "table"
        name = f"{_slug(self.title)}-table-{self._tables}.csv"
        self._parts.append(
            f'<div class="{kind}">{legend}<div class="scroll" tabindex="0" role="region" aria-labelledby="{label}">'
            f'<table aria-labelledby="{label}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            f'<button type="button" class="csv" data-name="{name}" hidden>save as CSV</button></div>'
        )
        return self

    def settings(self, settings: Mapping[str, Any], title: str = "") -> Page:
        """Settings as names and values; nested ones are written ``outer.inner``."""
        items = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(_show(value))}</dd></div>" for name, value in _flat(settings)
        )
        head = f"<summary>{escape(title)}</summary>" if title else ""
        block = f'<dl class="settings">{items}</dl>'
        self._parts.append(f"<details open>{head}{block}</details>" if title else block)
        return self

    def html(self) -> str:
        """The whole page as text."""
        script = _asset("page.js")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
        links = "".join(f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title in self._contents)
        contents = f'<nav aria-label="contents"><ol>{links}</ol></nav>' if len(self._contents) > 1 else ""
        subtitle = f'<p class="subtitle">{inline(self.subtitle)}</p>' if self.subtitle else ""
        close = "</section>" if self._contents else ""
        body = "\n".join(self._parts)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
            f'<meta name="generator" content="puma-robust {__version__}">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{_colours()}{_asset('style.css')}</style>\n</head>\n<body>\n"
            f"<header><h1>{escape(self.title)}</h1>{subtitle}</header>\n{contents}\n<main>\n{body}{close}\n</main>\n"
            f"<footer>Made by PUMA {__version__}. This page is one file and loads nothing.</footer>\n"
            f"<script>{script}</script>\n</body>\n</html>\n"
        )

    def write(self, path: Path | str) -> Path:
        """Write the page atomically and return where it lies.

        Raises:
            StorageError: the folder cannot be written, or the disk is full.
        """
        write_text(path, self.html())
        return Path(path)


def png_uri(image: NDArray[np.uint8]) -> str:
    """An image as a ``data:`` address, lossless.

    Raises:
        UsageError: not uint8 ``[H, W]``, ``[H, W, 1]`` or ``[H, W, 3]``.
    """
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise UsageError(
            f"cannot show an image of {image.dtype} {list(image.shape)}",
            why="it has to be uint8 [H, W], [H, W, 1] or [H, W, 3]",
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tile(image: NDArray[np.uint8], label: str, note: str) -> str:
    alt = escape(f"{label} {note}".strip())
    under = f"<span>{escape(note)}</span>" if note else ""
    return f'<span class="tile"><img src="{png_uri(image)}" alt="{alt}" title="{alt}">{under}</span>'


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            items += _flat(value, f"{prefix}{name}.")
        else:
            items.append((f"{prefix}{name}", value))
    return items


def _show(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return ", ".join(map(_show, value)) or "none"
    return "none" if value is None else str(value)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "page"


def _asset(name: str) -> str:
    return files("puma.report").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    light = " ".join(f"{variable(colour)}: {colour};" for colour in DARK)
    dark = " ".join(f"{variable(colour)}: {twin};" for colour, twin in DARK.items())
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
