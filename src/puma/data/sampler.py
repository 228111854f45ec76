"""Rows by chance: batches that follow from (seed, step) alone, so that a resumed run saves only its step; subsets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.errors import DataError, UsageError
from puma.rng import mixed_key, permuted, sampled

_REAL, _SYNTHETIC, _ORDER = 1, 2, 3


class BatchSampler:
    """Draw batches with a stated share of synthetic rows from the kept rows of a pool.

    Of each batch ``int(batch_size * synthetic_share)`` rows are synthetic and the rest real, as in Wang et al. 2023
    (arXiv 2302.04638). Real rows come without replacement: a new seeded permutation for each pass, and a pass may end
    inside a batch. No permutation is stored (`puma.rng`), so 50 M rows cost only the list of the kept ones.

    Args:
        synthetic: bool ``[N]``, the rows of the pool that are synthetic.
        keep: bool ``[N]``, the rows that may be drawn; None is all of them.
        batch_size: rows of one batch over all ranks.
        synthetic_share: in [0, 1]; ignored where the kept rows are all of one kind. None: drawn from all rows alike.
        seed: another seed is another order.
        replacement: draw synthetic rows (with share None: any row of a pool that has synthetic ones) with replacement,
            as in the published code; else by permutations too.
    """

    def __init__(
        self,
        synthetic: ArrayLike,
        *,
        batch_size: int,
        keep: ArrayLike | None = None,
        synthetic_share: float | None = None,
        seed: int = 0,
        replacement: bool = True,
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
        both = bool((kept & made).any() and (kept & ~made).any())
        if synthetic_share is None or not both:
            drawn_freely = replacement and bool((kept & made).any())
            self._streams = [_Stream(kept, batch_size, _REAL, seed, drawn_freely)]
            self.synthetic_per_batch: int | None = None if both else (batch_size if made[kept].all() else 0)
        else:
            count = int(batch_size * synthetic_share)
            self._streams = [
                _Stream(kept & made, count, _SYNTHETIC, seed, replacement),
                _Stream(kept & ~made, batch_size - count, _REAL, seed, False),
            ]
            self.synthetic_per_batch = count
        self.batch_size, self.seed = batch_size, seed
        self.kept = int(kept.sum())

    def indices(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """The pool rows of batch number ``step`` that ``rank`` of ``world`` takes, int64.

        The shares of all ranks are disjoint places of the batch that ``world=1`` gives, unpadded: where ``world`` does
        not divide the batch size, some ranks take one row fewer.
        """
        if step < 0 or not 0 <= rank < world or world > self.batch_size:
            raise UsageError(f"no batch for step {step}, rank {rank} of {world}, batch size {self.batch_size}")
        batch = np.concatenate([stream.rows(step) for stream in self._streams])
        places = np.arange(rank, self.batch_size, world, dtype=np.int64)
        return batch[permuted(places, self.batch_size, mixed_key(self.seed, _ORDER, step))]

    def batches(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[NDArray[np.int64]]:
        """`indices` of steps ``start`` to ``stop``; usable as ``batch_sampler`` of a ``torch`` ``DataLoader``."""
        for step in range(start, stop):
            yield self.indices(step, rank, world)


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
        out = np.empty(self._count, dtype=np.int64)
        passes = position // size
        for number in np.unique(passes):  # one or two, unless a batch is larger than what is kept
            of_pass = passes == number
            key = mixed_key(self._seed, self._number, int(number))
            out[of_pass] = self._rows[permuted(position[of_pass] % size, size, key)]
        return out


def stratified_rows(labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """``size`` rows with every class in its share, chosen at random inside each class, in ascending order.

    Shares are rounded by largest remainders, so each class is within one row of its exact share. Subsets of one seed
    are nested only by chance; the same arguments give the same rows on every machine.

    >>> stratified_rows(np.array([0, 0, 0, 0, 1, 1]), 3, seed=0).size
    3
    """
    if not 1 <= size <= len(labels):
        what = f"a subset of {size:,} cannot be taken from {len(labels):,} images"
        raise UsageError(what, fix=f"choose 1 to {len(labels)}")
    counts = np.bincount(labels)
    exact = counts * (size / len(labels))
    quota = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - quota), kind="stable")
    quota[order[: size - int(quota.sum())]] += 1
    by_class = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    chosen = [
        by_class[starts[label] + permuted(np.arange(quota[label]), int(counts[label]), mixed_key(seed, label))]
        for label in range(len(counts))
        if quota[label]
    ]
    return np.sort(np.concatenate(chosen))
