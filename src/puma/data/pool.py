"""The pool: the training images in a fixed order, real ones first, then each synthetic source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from puma.data.images import Rows
from puma.data.load import as_source
from puma.data.mapstyle import MapStyle
from puma.data.source import Source, checked_row, checked_rows
from puma.errors import DataError, UsageError
from puma.io import fingerprint

ROLES = ("real", "synthetic")


class Pool:
    """Several sources as one; a row's place never changes, and every artefact is keyed by it. Itself a `Source`.

    Args:
        sources: real ones first; any map-style dataset of (image, label) will do.
        roles: ``"real"`` or ``"synthetic"`` for each; by default the first is real and the others are synthetic.

    >>> from puma.data.load import load_dataset
    >>> pool = Pool([load_dataset("digits"), load_dataset("digits:test")])
    >>> len(pool), pool.source[0], pool.source[-1]
    (1797, 'digits', 'digits-test')

    Raises:
        UsageError: no source, a role that does not exist, other than one role for each source, a real source after a
            synthetic one.
        DataError: sources of different image shapes or classes.
    """

    spec: str | None = None

    def __init__(self, sources: Sequence[Source | MapStyle], roles: Sequence[str] | None = None) -> None:
        self.sources: tuple[Source, ...] = tuple(as_source(source) for source in sources)
        if not self.sources:
            raise UsageError("a pool needs at least one source")
        self.roles = tuple(roles) if roles is not None else ("real", *["synthetic"] * (len(self.sources) - 1))
        _check_roles(self.roles, len(self.sources))
        _check_alike(self.sources)
        first = self.sources[0]
        self.class_names, self.num_classes = first.class_names, first.num_classes
        self.image_shape = first.image_shape
        self._ends = np.cumsum([len(source) for source in self.sources])
        self.names = _unique_names(self.sources)

    @property
    def name(self) -> str:
        """The names of the sources, joined."""
        return "+".join(self.names)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """int64 ``[N]``."""
        return self.sources[0].labels if len(self.sources) == 1 else np.concatenate([s.labels for s in self.sources])

    @cached_property
    def source(self) -> SourceNames:
        """The name of each row's source: a lazy sequence; ``.codes`` is int16 ``[N]``."""
        return SourceNames(self.names, self._ends)

    @cached_property
    def synthetic(self) -> NDArray[np.bool_]:
        """bool ``[N]``: rows of synthetic sources."""
        flags = [role == "synthetic" for role in self.roles]
        return np.repeat(flags, [len(source) for source in self.sources])

    @cached_property
    def fingerprint(self) -> str:
        """Of the sources, their order and their roles; independent of names and places of files."""
        parts = zip(self.sources, self.roles, strict=True)
        return fingerprint({"pool": [[source.fingerprint, role, len(source)] for source, role in parts]})

    def describe(self) -> dict[str, Any]:
        """What tables and plans carry as ``meta["pool"]``."""
        parts = zip(self.names, self.roles, self.sources, strict=True)
        sources = [{"name": name, "role": role, "rows": len(source)} for name, role, source in parts]
        return {"fingerprint": self.fingerprint, "num_classes": self.num_classes, "sources": sources}

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        row = checked_row(index, len(self))
        number = int(np.searchsorted(self._ends, row, side="right"))
        source = self.sources[number]
        return source[row - int(self._ends[number]) + len(source)]

    def read(self, rows: Rows | slice) -> NDArray[np.uint8]:
        """Images at ``rows``: uint8 ``[B, H, W, C]``."""
        places = checked_rows(rows, len(self))
        if len(self.sources) == 1:
            return self.sources[0].read(places)
        owner = np.searchsorted(self._ends, places, side="right")
        out = np.empty((len(places), *self.image_shape), np.uint8)
        for number in np.unique(owner):
            mine = owner == number
            source = self.sources[number]
            out[mine] = source.read(places[mine] - (self._ends[number] - len(source)))
        return out

    def __repr__(self) -> str:
        parts = zip(self.names, self.roles, self.sources, strict=True)
        return f"<Pool {len(self):,}: " + ", ".join(f"{n} ({role}, {len(s):,})" for n, role, s in parts) + ">"


class SourceNames(Sequence[str]):
    """The source's name of each row, without N strings in memory."""

    def __init__(self, names: Sequence[str], ends: NDArray[np.int64]) -> None:
        self.names, self._ends = tuple(names), ends

    @cached_property
    def codes(self) -> NDArray[np.int16]:
        """int16 ``[N]``: number of the source."""
        return np.repeat(np.arange(len(self.names), dtype=np.int16), np.diff(self._ends, prepend=0))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self.names[int(np.searchsorted(self._ends, checked_row(index, len(self)), side="right"))]

    def __iter__(self) -> Iterator[str]:
        for name, rows in zip(self.names, np.diff(self._ends, prepend=0), strict=True):
            for _ in range(rows):
                yield name


def _check_roles(roles: tuple[str, ...], sources: int) -> None:
    if len(roles) != sources:
        raise UsageError(f"{len(roles)} roles for {sources} sources")
    for role in roles:
        if role not in ROLES:
            raise UsageError(f"unknown role {role!r}", fix='a source is "real" or "synthetic"')
    if list(roles) != sorted(roles, key=ROLES.index):
        raise UsageError(
            f"a real source stands after a synthetic one: {', '.join(roles)}", fix="put the real ones first"
        )


def _check_alike(sources: tuple[Source, ...]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.image_shape != first.image_shape:
            raise DataError(
                f"{other.name} has images {_shape(other)}, {first.name} has {_shape(first)}",
                why="all images of a pool have one shape",
                fix="open them with ?resize=32 or ?channels=3",
            )
        if other.num_classes > first.num_classes:
            raise DataError(
                f"{other.name} has {other.num_classes} classes, {first.name} has {first.num_classes}",
                why="labels of a pool mean the same in every source",
            )
        named = [source for source in (first, other) if not all(name.isdigit() for name in source.class_names)]
        if len(named) == 2 and other.class_names != first.class_names[: other.num_classes]:
            raise DataError(
                f"{other.name} calls its classes {_some(other.class_names)}, {first.name} {_some(first.class_names)}",
                why="labels of a pool mean the same in every source",
                fix="bring them into one order with ?classes=NAME,NAME,...",
            )


def _unique_names(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """Names as the sources give them, numbered where two are equal."""
    names: list[str] = []
    for source in sources:
        name, number = source.name, 2
        while name in names:
            name, number = f"{source.name}-{number}", number + 1
        names.append(name)
    return tuple(names)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _shape(source: Source) -> str:
    return "x".join(map(str, source.image_shape))
