"""How many rows may go from each source and class, and which end of a score they are taken from.

Every strategy prunes by the same quotas, so that strategies differ in *which* images they keep and in nothing else.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from puma.margins import MarginTable

End = Literal["high", "low"]


class Quota(NamedTuple):
    """The prunable rows of one source and class (int64 ``[n]``, ascending), and how many of them have to go.

    ``code`` is ``source * num_classes + class`` (0 for the only quota if unbalanced); it seeds the draw between ties.
    """

    code: int
    rows: NDArray[np.int64]
    remove: int


def make_quotas(table: MarginTable, prune_fraction: float, *, protect_real: bool, class_balanced: bool) -> list[Quota]:
    """Split the prunable rows by source and class and give each group its exact share of the cut.

    With ``protect_real`` only synthetic rows may go, if there are any; without ``class_balanced`` there is one quota.
    """
    codes: NDArray[Any] = np.zeros(len(table), np.int16)
    groups = 1
    if class_balanced:
        groups = len(table.sources) * table.num_classes
        # numpy sorts 16 bits by radix: linear time
        codes = table.source.astype(np.int16 if groups <= np.iinfo(np.int16).max else np.int64)
        codes *= table.num_classes
        codes += table.label
    synthetic = table.synthetic
    if protect_real and synthetic.any():
        rows = np.flatnonzero(synthetic)
        order = rows[np.argsort(codes[rows], kind="stable")]
    else:
        order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes[order], minlength=groups)
    present = np.flatnonzero(sizes)
    sizes = sizes[present]
    parts = zip(present, sizes, np.cumsum(sizes), split_exactly(sizes, prune_fraction), strict=True)
    return [Quota(int(code), order[stop - size : stop], int(remove)) for code, size, stop, remove in parts]


def split_exactly(sizes: NDArray[np.integer[Any]], fraction: float) -> NDArray[np.int64]:
    """How many of each group make ``fraction`` of the whole, by largest remainder: the total is exact.

    The total is ``fraction * sum(sizes)``, a half rounded up; no group is more than one away from its own share. Equal
    remainders go to the larger group, then to the earlier one.

    >>> split_exactly(np.array([10, 10, 5]), 0.3)
    array([3, 3, 2])
    """
    exact = fraction * sizes.astype(np.float64)
    parts = np.floor(exact + 1e-9).astype(np.int64)
    missing = int(np.floor(fraction * float(sizes.sum()) + 0.5 + 1e-9)) - int(parts.sum())
    order = np.lexsort((np.arange(len(sizes)), -sizes, -np.round(exact - parts, 9)))
    parts[order[:missing]] += 1
    return parts


def extreme(scores: NDArray[np.float32], count: int, end: End, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark the ``count`` highest or lowest scores; equal scores at the cut are drawn at random. Linear time.

    NaN has no rank and is never marked, -inf is the lowest of all. Where fewer have a score, all of those are marked.

    >>> extreme(np.float32([3, np.nan, 1, 2]), 2, "high", np.random.default_rng(0))
    array([ True, False, False,  True])
    """
    ranked = scores[~np.isnan(scores)]
    count = min(count, len(ranked))
    if count <= 0:
        return np.zeros(len(scores), dtype=bool)
    place = len(ranked) - count if end == "high" else count - 1
    ranked.partition(place)
    cut = ranked[place]
    marked: NDArray[np.bool_] = np.greater(scores, cut) if end == "high" else np.less(scores, cut)
    ties = np.flatnonzero(scores == cut)
    missing = count - int(np.count_nonzero(marked))
    marked[ties if missing == len(ties) else rng.choice(ties, missing, replace=False)] = True
    return marked
