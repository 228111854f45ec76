"""Semantic deduplication: the rows most similar to another row of their k-means cell go first (SemDeDup)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.strategies.features import Features, read_features
from puma.strategies.problem import Choice, Problem, whole
from puma.strategies.registry import strategy

BLOCK = 1_024


@strategy(
    "dedup", prunes="near-duplicates", source="Abbas et al. 2023, SemDeDup, arXiv 2303.09540", needs=("features",)
)
def dedup(problem: Problem, *, features: Features, cell_rows: int = 1_000) -> Choice:
    """Drop the rows most similar (cosine) to a row farther from the centre of their k-means cell; full eps.

    Cells are made inside each quota (source and class), about ``cell_rows`` rows in each. SemDeDup drops rows above a
    similarity threshold; here the quota sets the threshold, so that plans of equal size can be compared.
    """
    cell_rows = whole("cell_rows", cell_rows, low=2)
    vectors = read_features(features, len(problem))
    similarity = np.full(len(problem), np.nan, np.float32)
    for group in problem.quotas:
        if group.remove:
            seed = int(problem.rng(2, group.code).integers(2**31))
            similarity[group.rows] = duplicate_scores(vectors[group.rows], cell_rows, seed)
    return Choice(problem.drop(similarity, "high"), problem.uniform())


def duplicate_scores(features: NDArray[np.floating[Any]], cell_rows: int = 1_000, seed: int = 0) -> NDArray[np.float32]:
    """How much each row repeats another: the largest cosine to a row of its cell that is kept before it.

    Rows of a cell are ranked from far from its centre to near (SemDeDup keeps the outlying of two duplicates); a row is
    compared with those ranked before it, so that of a set of duplicates one stays.

    Args:
        features: ``[n, D]``, of any length but 0.
        cell_rows: rows in a k-means cell, about.
        seed: for k-means.

    Returns:
        float32 ``[n]`` in [-1, 1], higher = more redundant; the first of each cell has -1.
    """
    from sklearn.cluster import MiniBatchKMeans

    unit = np.array(features, dtype=np.float32)
    lengths = np.linalg.norm(unit, axis=1, keepdims=True)
    unit /= np.where(lengths > 0, lengths, np.float32(1))
    cells = max(1, round(len(unit) / cell_rows))
    if cells == 1:
        cell, centres = np.zeros(len(unit), np.int64), unit.mean(axis=0, keepdims=True)
    else:
        means = MiniBatchKMeans(cells, random_state=seed, n_init=1, batch_size=max(4_096, 2 * cells)).fit(unit)
        cell, centres = means.labels_, means.cluster_centers_
    nearness = np.einsum("nd,nd->n", unit, centres[cell])
    order = np.lexsort((nearness, cell))
    scores = np.full(len(unit), -1, np.float32)
    stops = np.cumsum(np.bincount(cell, minlength=len(centres)))
    for start, stop in zip(np.concatenate([[0], stops[:-1]]), stops, strict=True):
        rows = order[start:stop]
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            cosine = unit[block] @ unit[rows[: first + len(block)]].T  # [b, rows so far]
            place = np.arange(first, first + len(block))
            cosine[np.arange(cosine.shape[1])[None, :] >= place[:, None]] = -1
            scores[block] = cosine.max(axis=1)
    return np.clip(scores, -1, 1, out=scores)
