"""Self-contained HTML pages from Jinja2 templates: one file, no request to anywhere, the same bytes every time.

Every value is escaped by Jinja2's autoescape. Figures are SVG images on white inside the file, so that they read in any
theme and cannot run anything; the content security policy forbids every request and every script but our own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from puma._version import __version__
from puma.errors import UsageError
from puma.io import write_text
from puma.plots import svg_text
from puma.report.tables import Table, number, show


@dataclass(frozen=True)
class Picture:
    """A figure for a page.

    Args:
        figure: the matplotlib figure.
        alt: what it shows, for somebody who cannot see it, with the numbers that matter.

    Raises:
        UsageError: no alt text.
    """

    figure: Figure
    alt: str

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise UsageError("a figure has no alt text", fix="say in a sentence what it shows")

    @cached_property
    def svg(self) -> str:
        """The figure as SVG; rendered once, as a second rendering may place ticks otherwise."""
        return svg_text(self.figure)

    @property
    def uri(self) -> str:
        """The figure as a ``data:`` address."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()

    @property
    def width(self) -> int:
        """Widest that it is shown, in CSS pixels."""
        return round(float(self.figure.get_figwidth()) * 144)


@dataclass(frozen=True)
class ImageRow:
    """A labelled row of thumbnails: uint8 images ``[H, W]`` or ``[H, W, C]`` and, if wanted, a note under each."""

    label: str
    images: Sequence[NDArray[np.uint8]]
    notes: Sequence[str] = ()

    @property
    def tiles(self) -> list[tuple[str, str]]:
        """Address and note of every image."""
        notes = [*self.notes, *[""] * (len(self.images) - len(self.notes))]
        return [(png_uri(image), note) for image, note in zip(self.images, notes, strict=True)]


@dataclass
class Report:
    """What a page shows, before it is HTML, files or a PDF.

    Args:
        template: its template.
        title: one line.
        pictures: by the name of the exported file.
        tables: by the name of the exported file.
        values: everything else that the template uses.
    """

    template: str
    title: str
    pictures: dict[str, Picture] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def html(self) -> str:
        """The page."""
        return render(self.template, title=self.title, pictures=self.pictures, tables=self.tables, **self.values)

    def write(self, path: Path | str) -> Path:
        """Write the page and return its path.

        Raises:
            StorageError: the folder cannot be written, or the disk is full.
        """
        write_text(path, self.html())
        return Path(path)


def render(template: str, **values: Any) -> str:
    """Text of the page that a template of ``puma/report/templates`` makes of ``values``.

    Raises:
        jinja2.UndefinedError: the template uses a value that is not given.
    """
    return _environment().get_template(template).render(**values) + "\n"


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


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("puma.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = files("puma.report").joinpath("templates/page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(version=__version__, script=Markup(script), script_digest=digest)
    environment.filters.update(inline=_inline, flatten=flatten, show=show, number=number)
    return environment


def _inline(text: str) -> Markup:
    """Escaped text in which what stands between backticks is set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
