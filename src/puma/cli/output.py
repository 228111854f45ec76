"""What commands print: text that may come from strangers, facts, and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

import typer

from puma.errors import printable

_MOST_ITEMS, _MOST_CHARACTERS = 12, 160


def echo(text: object = "", *, err: bool = False) -> None:
    """Print text whose names may come from strangers: control characters are shown, not obeyed."""
    typer.echo(printable(text), err=err)


def duration(seconds: float) -> str:
    """A time as a person says it.

    >>> duration(17.2), duration(5400), duration(1.4e6)
    ('17 s', '1.5 h', '16.2 days')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows of values; the first column holds texts, the others numbers. Nothing is read as markup."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for number, head in enumerate(heads):
        shown = Text(fill(head, 14) if number else head)  # a wide head would leave no room for the first column
        table.add_column(shown, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(value)) for value in row))
    Console().print(table)


def print_facts(facts: Mapping[str, Any], *, most: int | None = None) -> None:
    """Print names and values, one a line; what lies inside another is indented. At most ``most`` lines, if given."""
    lines = list(_flat(facts, full=most is None))
    width = max((len(name) for name, _ in lines[:most]), default=0)
    for name, value in lines[:most]:
        echo(f"{name:{width}}  {value}".rstrip())
    if most is not None and len(lines) > most:
        echo(f"... and {len(lines) - most} lines more (--all shows them)")


def _flat(facts: Mapping[str, Any], depth: int = 0, *, full: bool) -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        label = "  " * depth + str(name)
        if isinstance(value, Mapping) and value:
            yield label, ""
            yield from _flat(value, depth + 1, full=full)
        else:
            yield label, short(value, full=full)


def short(value: Any, *, full: bool = False) -> str:
    """A value on one line; unless ``full``, long lists and texts are cut, and a SHA-256 to its first 12 digits.

    >>> short([1, 2]), short(0.1 + 0.2), short([{"a": 1, "b": 2}, 3]), short(None)
    ('1, 2', '0.3', '(a 1, b 2), 3', 'none')
    """
    if value is None or value in ([], {}, ""):
        return "none"
    if isinstance(value, Mapping):
        value = [f"{key} {short(inner, full=full)}" for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        shown = value if full else value[:_MOST_ITEMS]
        more = f", ... ({len(value)} in all)" if len(value) > len(shown) else ""
        texts = [f"({short(one, full=full)})" if isinstance(one, Mapping) else short(one, full=full) for one in shown]
        return short(", ".join(texts), full=full) + more
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())
    most = 12 if re.fullmatch(r"[0-9a-f]{64}", text) else _MOST_CHARACTERS
    return text if full or len(text) <= most else f"{text[:most]}..."
