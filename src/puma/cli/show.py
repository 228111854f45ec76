"""``puma show``: what a file or folder is, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from puma.cli import facts
from puma.cli.facts import Facts
from puma.errors import DataError


def show(
    artefact: Annotated[
        Path,
        typer.Argument(help="Margin table, plan, run, study, evaluation, flags, weights, state, settings or data set."),
    ],
) -> None:
    """Say what an artefact is, how it was made and what it holds. Reads only."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kind, found = describe(artefact)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _flat(found):
        table.add_row(Text(name, style="bold"), Text(value))
    console = Console()
    console.print(Text(f"{artefact}: {kind}"), soft_wrap=True)  # a path that is broken in two cannot be copied
    console.print(table)


def describe(path: Path) -> tuple[str, Facts]:
    """The kind of an artefact and the facts a person asks for first.

    Raises:
        DataError: nothing there, or nothing that PUMA knows.
    """
    if path.is_dir():
        for mark, kind, told in _FOLDERS:
            if any(path.glob(mark)):
                return kind, told(path)
        raise DataError(f"{path} holds no table, run or study", fix="name one of its files")
    if path.is_file() and path.suffix in _FILES:
        return _FILES[path.suffix](path)
    return "data set", facts.data_set(path)


def _parquet(path: Path) -> tuple[str, Facts]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file", why=str(error)) from None
    schema = json.loads(metadata.get(b"puma", b"{}")).get("schema") or metadata.get(b"schema", b"").decode()
    if path.name == "mislabelled.parquet":  # those of earlier studies name no schema
        schema = "puma.mislabelled"
    for family, kind, told in _TABLES:
        if schema.startswith(family):
            return kind, told(path)
    return "data set", facts.data_set(path)


def _flat(found: Facts, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Names and values, one line each; what lies inside another is indented below its name."""
    for name, value in found.items():
        label = "  " * depth + str(name)
        if isinstance(value, dict) and value:
            yield label, ""
            yield from _flat(value, depth + 1)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            yield label, "\n".join(value) or "none"
        elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
            yield label, "\n".join(", ".join(f"{key} {entry}" for key, entry in item.items()) for item in value)
        else:
            yield label, str(value)


_FOLDERS: list[tuple[str, str, Callable[[Path], Facts]]] = [
    ("study.toml", "study", facts.study),
    ("part-*.parquet", "margin table", facts.margin_table),
    ("recipe.toml", "run", facts.run),
]
_TABLES: list[tuple[str, str, Callable[[Path], Facts]]] = [
    ("puma.margins", "margin table", facts.margin_table),
    ("puma.plan", "plan", facts.plan),
    ("puma.results", "results of a study", facts.results),
    ("puma.flags", "flags of a study", facts.study_flags),
    ("puma.mislabelled", "mislabelled perturbed images of a study", facts.mislabelled),
    ("puma.evaluation", "flags of an evaluation", facts.evaluation_flags),  # whole, or a piece of one
]
_FILES: dict[str, Callable[[Path], tuple[str, Facts]]] = {
    ".parquet": _parquet,
    ".safetensors": facts.weights,
    ".json": facts.record,
    ".toml": facts.settings,
}
