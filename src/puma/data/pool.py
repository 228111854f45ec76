"""The pool: the training images in a fixed order, real ones first, then each synthetic source; rows as tensors.

torch is imported only where tensors are made: plans are drawn up without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from puma.data.checks import match_classes
from puma.data.load import as_source
from puma.data.source import MapStyle, Pixels, Rows, Source, checked_row, joined
from puma.errors import DataError, UsageError
from puma.io import fingerprint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from puma.plan import Plan

_ROLES = ("real", "synthetic")


class Pool(Source):
    """Several sources as one; a row's place never changes, and every artefact is keyed by it. Itself a `Source`.

    Args:
        sources: real ones first, or a single one; anything that `load_dataset` takes will do.
        roles: ``"real"`` or ``"synthetic"`` for each; by default the first is real and the others are synthetic.

    >>> pool = Pool(["digits", "digits:test"])
    >>> len(pool), pool.source[0], pool.source[-1]
    (1797, 'digits', 'digits-test')
    """

    def __init__(
        self, sources: Sequence[Source | MapStyle | str] | Source | str, roles: Sequence[str] | None = None
    ) -> None:
        sources = [sources] if isinstance(sources, (str, Source)) else sources
        if not len(sources):
            raise UsageError("a pool needs at least one source")
        self.sources, names = _alike([as_source(source) for source in sources])
        self.roles = tuple(roles) if roles is not None else ("real", *["synthetic"] * (len(self.sources) - 1))
        if len(self.roles) != len(self.sources):
            raise UsageError(f"{len(self.roles)} roles for {len(self.sources)} sources")
        for role in self.roles:
            if role not in _ROLES:
                raise UsageError(f"unknown role {role!r}", fix='a source is "real" or "synthetic"')
        if list(self.roles) != sorted(self.roles, key=_ROLES.index):
            seen = ", ".join(self.roles)
            raise UsageError(f"a real source stands after a synthetic one: {seen}", fix="put the real ones first")
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
        """Refuse a plan of another pool: `DataError` for another number of rows or another fingerprint."""
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


def _alike(sources: list[Source]) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """The sources with their classes matched by name with those of the first, or of the first that has names; these."""

    def numbered(names: tuple[str, ...]) -> bool:
        return names == tuple(map(str, range(len(names))))

    first = sources[0]
    names, whose = first.class_names, first.name
    out = [first]
    for other in sources[1:]:
        shapes = ["x".join(map(str, source.image_shape)) for source in (other, first)]
        if shapes[0] != shapes[1]:
            fix = "add ?resize= and ?channels=3 to a source"
            raise DataError(f"{other.name} has images {shapes[0]}, {first.name} has {shapes[1]}", fix=fix)
        out.append(match_classes(other, names, whose))
        if numbered(names) and not numbered(other.class_names) and len(names) == other.num_classes:
            names, whose = other.class_names, other.name
    return tuple(out), names


def _unique_names(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """Names as the sources give them, numbered where two are equal."""
    names: list[str] = []
    for source in sources:
        name, number = source.name, 2
        while name in names:
            name, number = f"{source.name}-{number}", number + 1
        names.append(name)
    return tuple(names)


# --- tensors -------------------------------------------------------------------------------------------------------


def to_tensor(images: Pixels | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Turn uint8 ``[B, H, W, C]`` (0..255) into contiguous float32 ``[B, C, H, W]`` in [0, 1].

    The bytes are moved to ``device`` first and become floats there: a quarter of the traffic.

    >>> to_tensor(np.full((2, 4, 4, 3), 255, np.uint8)).shape
    torch.Size([2, 3, 4, 4])
    """
    import torch

    batch = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    if device is not None:
        target = torch.device(device)
        pinned = batch.pin_memory() if target.type == "cuda" and not batch.is_cuda else batch
        batch = pinned.to(target, non_blocking=True)
    return batch.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)


def read_batch(source: Source, rows: Rows, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Rows of a source or pool as ``(float32 [B, C, H, W] in [0, 1], int64 [B])`` on ``device``, read as one block."""
    import torch

    labels = torch.from_numpy(np.asarray(source.labels[rows], dtype=np.int64))
    return to_tensor(source.read(rows), device), labels if device is None else labels.to(device)


class PlannedDataset:
    """The kept images of a pool, each with its own eps, for anybody's training loop.

    ``dataset[i]`` is ``(float32 tensor [C, H, W] in [0, 1], label, eps)``; ``dataset.index[i]`` its row in the pool.
    A ``torch`` ``DataLoader`` takes it as it is (and fetches each batch in one read); its batches have float32 images,
    int64 labels and float32 eps.

    Args:
        pool: the pool (or its one source) that the plan was made for; `DataError` for another.
        plan: which rows are kept, and their eps.
        transform: applied to each image tensor.
    """

    def __init__(self, pool: Source, plan: Plan, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.pool = pool if isinstance(pool, Pool) else Pool([pool])
        self.pool.check_plan(plan)
        self.plan, self.transform = plan, transform
        self.index: NDArray[np.int64] = np.flatnonzero(plan.keep)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Tensor, int, np.float32]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Tensor, int, np.float32]]:
        """Several items in one read; ``DataLoader`` calls this."""
        rows = self.index[[checked_row(item, len(self)) for item in items]]
        images: Sequence[Tensor] = list(to_tensor(self.pool.read(rows)))
        if self.transform is not None:
            images = [self.transform(image) for image in images]
        eps = self.plan.eps[rows].astype(np.float32, copy=False)  # Python floats would be collated to float64
        return list(zip(images, self.pool.labels[rows].tolist(), eps, strict=True))
