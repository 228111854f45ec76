"""The pool: the training images in a fixed order, real ones first, then each synthetic source; tensors and batches.

torch is imported only where tensors are made: plans are drawn up without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.data.checks import match_classes
from puma.data.load import as_source
from puma.data.source import MapStyle, Pixels, Rows, Source, joined
from puma.errors import DataError, UsageError, unknown
from puma.io import fingerprint
from puma.rng import mixed_key, permuted, sampled

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import Tensor

    from puma.plan import Plan

_ROLES = ("real", "synthetic")


class Pool(Source):
    """Several sources as one `Source`; a row's place never changes, and every artefact is keyed by it.

    Args:
        sources: real ones first, or a single one; anything that `load_dataset` takes will do.
        roles: ``"real"`` or ``"synthetic"`` for each; by default the first is real and the others are synthetic.
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
        if strange := [role for role in self.roles if role not in _ROLES]:
            raise unknown("role", strange[0], _ROLES)
        if list(self.roles) != sorted(self.roles, key=_ROLES.index):
            seen = ", ".join(self.roles)
            raise UsageError(f"a real source stands after a synthetic one: {seen}", fix="put the real ones first")
        self.names: list[str] = []  # as the sources give them, numbered where two are equal
        for source in self.sources:
            choices = (f"{source.name}-{number}" if number > 1 else source.name for number in count(1))
            self.names.append(next(name for name in choices if name not in self.names))
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
    def source_number(self) -> NDArray[np.int16]:
        """int16 ``[N]``: the place of each row's source among the sources."""
        return np.repeat(np.arange(len(self.sources), dtype=np.int16), [len(source) for source in self.sources])

    @cached_property
    def source(self) -> pd.Categorical[str]:
        """The name of each row's source."""
        import pandas as pd

        return pd.Categorical.from_codes(self.source_number, pd.Index(self.names))

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
            what = f"the plan was made for another pool ({planned[:12]}) than this one ({self.fingerprint[:12]})"
            why = "the same number of rows, but not the same images, order or roles"
            raise DataError(what, why=why, fix="score and plan this pool, or train on that one")

    def __repr__(self) -> str:
        parts = zip(self.names, self.roles, self.sources, strict=True)
        return f"<Pool {len(self):,}: " + ", ".join(f"{n} ({role}, {len(s):,})" for n, role, s in parts) + ">"


def _alike(sources: list[Source]) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """The sources, their classes numbered as those of the first, or of the first that has names, by name; the names."""
    first = sources[0]
    names, whose, out = first.class_names, first.name, [first]
    for other in sources[1:]:
        shapes = ["x".join(map(str, source.image_shape)) for source in (other, first)]
        if shapes[0] != shapes[1]:
            fix = "add ?resize= and ?channels=3 to a source"
            raise DataError(f"{other.name} has images {shapes[0]}, {first.name} has {shapes[1]}", fix=fix)
        out.append(match_classes(other, names, whose))
        if names == tuple(map(str, range(other.num_classes))):  # the first of these names wins
            names, whose = other.class_names, other.name
    return tuple(out), names


# --- tensors -------------------------------------------------------------------------------------------------------


def to_tensor(images: Pixels | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Turn uint8 ``[B, H, W, C]`` into contiguous float32 ``[B, C, H, W]`` in [0, 1], on ``device``: moved as bytes."""
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
    """The kept images of a pool, each with its own eps, for anybody's training loop and ``torch``'s ``DataLoader``.

    ``dataset[i]`` is ``(float32 tensor [C, H, W] in [0, 1], label, eps)``, ``eps`` float32 in batches too, and
    ``dataset.index[i]`` its row in ``pool``: the pool (or its one source) that ``plan`` was made for, else `DataError`.
    ``transform`` is applied to each image tensor.
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
        rows = self.index[[range(len(self))[item] for item in items]]
        images = [self.transform(image) if self.transform else image for image in to_tensor(self.pool.read(rows))]
        eps = self.plan.eps[rows].astype(np.float32, copy=False)  # Python floats would be collated to float64
        return list(zip(images, self.pool.labels[rows].tolist(), eps, strict=True))


# --- batches -------------------------------------------------------------------------------------------------------

_REAL, _SYNTHETIC, _ORDER = 1, 2, 3


class BatchSampler:
    """Draw batches with a stated share of synthetic rows from the kept rows of a pool.

    Of each batch ``int(batch_size * synthetic_share)`` rows are synthetic, drawn with replacement, and the rest are
    real, as in Wang et al. 2023 (arXiv 2302.04638). Real rows come by seeded permutations, and a pass may end inside a
    batch. Batches follow from (seed, step) alone; 50 M rows cost only the list of the kept ones.

    Args:
        synthetic: bool ``[N]``, the rows of the pool that are synthetic.
        batch_size: rows of one batch over all ranks.
        keep: bool ``[N]``, the rows that may be drawn; None is all of them.
        synthetic_share: in [0, 1]; ignored where the kept rows are all of one kind. None: drawn from all rows alike.
        seed: another seed is another order.
    """

    def __init__(
        self,
        synthetic: ArrayLike,
        *,
        batch_size: int,
        keep: ArrayLike | None = None,
        synthetic_share: float | None = None,
        seed: int = 0,
    ) -> None:
        made = np.asarray(synthetic, dtype=bool)
        kept = np.ones(len(made), dtype=bool) if keep is None else np.asarray(keep)
        if kept.dtype != bool:
            fix = "mask = np.zeros(len(pool), bool); mask[rows] = True"
            raise UsageError(f"keep is {kept.dtype}, not a mask", fix=fix)
        if kept.shape != made.shape:
            raise DataError(f"the plan has {len(kept):,} rows, the pool {len(made):,}", fix="plan this pool again")
        if not kept.any():
            raise DataError("no row is kept: there is nothing to draw batches from")
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size} is below 1")
        if synthetic_share is not None and not 0 <= synthetic_share <= 1:
            raise UsageError(f"synthetic share {synthetic_share} is not in [0, 1]")
        self.batch_size, self.seed, self.kept = batch_size, seed, int(kept.sum())
        some_synthetic, some_real = bool((kept & made).any()), bool((kept & ~made).any())
        if synthetic_share is None or not (some_synthetic and some_real):
            self._streams = [_Stream(kept, batch_size, _REAL, seed, some_synthetic)]
        else:
            share = int(batch_size * synthetic_share)
            made_rows = _Stream(kept & made, share, _SYNTHETIC, seed, True)
            self._streams = [made_rows, _Stream(kept & ~made, batch_size - share, _REAL, seed, False)]

    def indices(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """int64 rows of batch number ``step`` that ``rank`` of ``world`` takes: together what ``world=1`` gives."""
        if step < 0 or not 0 <= rank < world or world > self.batch_size:
            raise UsageError(f"no batch for step {step}, rank {rank} of {world}, batch size {self.batch_size}")
        batch = np.concatenate([stream.rows(step) for stream in self._streams])
        places = np.arange(rank, self.batch_size, world, dtype=np.int64)
        return batch[permuted(places, self.batch_size, mixed_key(self.seed, _ORDER, step))]


class _Stream:
    """An endless sequence of one kind of rows, ``count`` of them a batch."""

    def __init__(self, chosen: NDArray[np.bool_], count: int, number: int, seed: int, replacement: bool) -> None:
        rows = np.flatnonzero(chosen)
        self._rows = rows.astype(np.uint32) if len(chosen) < 2**32 else rows
        self._count, self._number, self._seed, self._replacement = count, number, seed, replacement

    def rows(self, step: int) -> NDArray[np.int64]:
        size = len(self._rows)
        if self._replacement:
            return self._rows[sampled(self._count, size, mixed_key(self._seed, self._number, step))].astype(np.int64)
        position = np.arange(step * self._count, (step + 1) * self._count, dtype=np.int64)
        passes = np.unique(position // size).tolist()  # one or two, unless a batch is larger than what is kept
        parts = (position[position // size == number] % size for number in passes)
        keys = (mixed_key(self._seed, self._number, number) for number in passes)
        order = [permuted(part, size, key) for part, key in zip(parts, keys, strict=True)]
        return self._rows[np.concatenate(order or [position])].astype(np.int64)
