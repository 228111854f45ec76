"""What a report says, before it becomes a page or files: sections of pictures, tables, galleries and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from puma.report.page import ImageRow, NoteKind, Page


@dataclass(frozen=True)
class Picture:
    """A figure with its caption and its alt text; ``name`` is its file name when exported."""

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """A table; ``name`` is its file name when exported, cells are as in `Page.table`."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str

    def filled(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows without the columns that are empty in every row."""
        kept = [i for i in range(len(self.columns)) if not self.rows or any(row[i] is not None for row in self.rows)]
        return [self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows]


@dataclass(frozen=True)
class Gallery:
    """Rows of images."""

    rows: Sequence[ImageRow]
    caption: str


@dataclass(frozen=True)
class Note:
    """A remark set apart."""

    kind: NoteKind
    text: str


@dataclass(frozen=True)
class Settings:
    """Names and values."""

    values: Mapping[str, Any]
    title: str = ""


@dataclass(frozen=True)
class Code:
    """A command or a file, as it is."""

    text: str


@dataclass(frozen=True)
class Heading:
    """Begins a part of a section."""

    title: str


Item = str | Picture | Table | Gallery | Note | Settings | Code | Heading


@dataclass(frozen=True)
class Section:
    """A titled list of items; a plain string is a paragraph."""

    title: str
    items: list[Item] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    subtitle: str
    sections: list[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures in their order."""
        return [item for section in self.sections for item in section.items if isinstance(item, Picture)]

    @property
    def tables(self) -> list[Table]:
        """All tables in their order."""
        return [item for section in self.sections for item in section.items if isinstance(item, Table)]

    def page(self) -> Page:
        """The report as a page; sections without items are left out."""
        page = Page(self.title, self.subtitle)
        for section in self.sections:
            if section.items:
                page.section(section.title)
            for item in section.items:
                _add(page, item)
        return page


def _add(page: Page, item: Item) -> None:
    match item:
        case str():
            page.text(item)
        case Picture():
            page.figure(item.figure, item.caption, item.alt)
        case Table():
            page.table(*item.filled(), item.caption)
        case Gallery():
            page.images(item.rows, item.caption)
        case Note():
            page.note(item.kind, item.text)
        case Settings():
            page.settings(item.values, item.title)
        case Code():
            page.code(item.text)
        case Heading():
            page.subsection(item.title)
