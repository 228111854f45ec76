"""The pool: the training images in a fixed order, real ones first, then each synthetic source."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from puma.data.checks import match_classes
from puma.data.load import as_source
from puma.data.source import MapStyle, Source, checked_row, joined
from puma.errors import DataError, UsageError
from puma.io import fingerprint

if TYPE_CHECKING:
    from puma.plan import Plan

ROLES = ("real", "synthetic")


class Pool(Source):
    """Several sources as one; a row's place never changes, and every artefact is keyed by it. Itself a `Source`.

    Args:
        sources: real ones first, or a single one; anything that `load_dataset` takes will do.
        roles: ``"real"`` or ``"synthetic"`` for each; by default the first is real and the others are synthetic.

    >>> pool = Pool(["digits", "digits:test"])
    >>> len(pool), pool.source[0], pool.source[-1]
    (1797, 'digits', 'digits-test')

    Raises:
        UsageError: no source, a role that does not exist, other than one role for each source, a real source after a
            synthetic one.
        DataError: sources of different image shapes or classes.
    """

    def __init__(
        self, sources: Sequence[Source | MapStyle | str] | Source | str, roles: Sequence[str] | None = None
    ) -> None:
        sources = [sources] if isinstance(sources, (str, Source)) else sources
        if not len(sources):
            raise UsageError("a pool needs at least one source")
        self.sources, names = _alike([as_source(source) for source in sources])
        self.roles = tuple(roles) if roles is not None else ("real", *["synthetic"] * (len(self.sources) - 1))
        _check_roles(self.roles, len(self.sources))
        self.names = _unique_names(self.sources)
        parts = [[source.fingerprint, role, len(source)] for source, role in zip(self.sources, self.roles, strict=True)]
        labels = [source.labels for source in self.sources]
        super().__init__(
            joined([source.images for source in self.sources]),
            labels[0] if len(labels) == 1 else np.concatenate(labels),
            name="+".join(self.names),
            fingerprint=fingerprint({"pool": parts}),
            class_names=names,
        )

    @cached_property
    def source(self) -> SourceNames:
        """The name of each row's source: a lazy sequence; ``.codes`` is int16 ``[N]``."""
        return SourceNames(self.names, np.cumsum([len(source) for source in self.sources]))

    @cached_property
    def synthetic(self) -> NDArray[np.bool_]:
        """bool ``[N]``: rows of synthetic sources."""
        flags = [role == "synthetic" for role in self.roles]
        return np.repeat(flags, [len(source) for source in self.sources])

    def describe(self) -> dict[str, Any]:
        """The pool as tables and plans record it in ``meta["pool"]``."""
        parts = zip(self.names, self.roles, self.sources, strict=True)
        sources = [{"name": name, "role": role, "rows": len(source)} for name, role, source in parts]
        return {"fingerprint": self.fingerprint, "num_classes": self.num_classes, "sources": sources}

    def check_plan(self, plan: Plan) -> None:
        """Refuse a plan of another pool.

        Raises:
            DataError: another number of rows, or another fingerprint than that of the plan's ``meta["pool"]``.
        """
        if len(plan.keep) != len(self):
            what = f"the plan has {len(plan.keep):,} rows, the pool {len(self):,}"
            raise DataError(what, fix="plan this pool again, or open the sources and options that were scored")
        planned = str((plan.meta.get("pool") or {}).get("fingerprint"))
        if planned != self.fingerprint:
            raise DataError(
                f"the plan was made for another pool ({planned[:12]}) than this one ({self.fingerprint[:12]})",
                why="the same number of rows, but not the same images, order or roles",
                fix="score and plan this pool, or train on that one",
            )

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

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        return self.names[int(np.searchsorted(self._ends, checked_row(index, len(self)), side="right"))]


def _check_roles(roles: tuple[str, ...], sources: int) -> None:
    if len(roles) != sources:
        raise UsageError(f"{len(roles)} roles for {sources} sources")
    for role in roles:
        if role not in ROLES:
            raise UsageError(f"unknown role {role!r}", fix='a source is "real" or "synthetic"')
    if list(roles) != sorted(roles, key=ROLES.index):
        seen = ", ".join(roles)
        raise UsageError(f"a real source stands after a synthetic one: {seen}", fix="put the real ones first")


def _alike(sources: list[Source]) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """The sources with their classes matched by name with those of the first, or of the first that has names; these."""
    first = sources[0]
    names, whose = first.class_names, first.name
    out = [first]
    for other in sources[1:]:
        shapes = ["x".join(map(str, source.image_shape)) for source in (other, first)]
        if shapes[0] != shapes[1]:
            fix = "add ?resize= and ?channels=3 to a source"
            raise DataError(f"{other.name} has images {shapes[0]}, {first.name} has {shapes[1]}", fix=fix)
        out.append(match_classes(other, names, whose))
        if _named(other.class_names) and not _named(names) and len(names) == other.num_classes:
            names, whose = other.class_names, other.name
    return tuple(out), names


def _named(names: tuple[str, ...]) -> bool:
    """Whether classes have names, and not just numbers."""
    return names != tuple(map(str, range(len(names))))


def _unique_names(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """Names as the sources give them, numbered where two are equal."""
    names: list[str] = []
    for source in sources:
        name, number = source.name, 2
        while name in names:
            name, number = f"{source.name}-{number}", number + 1
        names.append(name)
    return tuple(names)
