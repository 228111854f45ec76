"""Selectors from the literature: scores of a training run, coverage of the margin, near-duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.strategies.context import Selection, SelectionContext, integer, number
from puma.strategies.features import Features, extrapolate, read_features
from puma.strategies.quotas import extreme
from puma.strategies.registry import strategy

BLOCK = 1_024


@strategy("el2n-adv", prunes="low error", source="Paul et al. 2021, arXiv 2107.07075", needs=("el2n-adv",))
def el2n_adv(context: SelectionContext) -> Selection:
    """Drop the lowest EL2N error on adversarial images (the easy ones); full eps."""
    return Selection(context.drop(context.score("el2n-adv"), "low"), context.uniform_eps())


@strategy(
    "robust-failure", prunes="high frequency", source="Dong et al. 2021, arXiv 2102.07437", needs=("robust-failure",)
)
def robust_failure(context: SelectionContext) -> Selection:
    """Drop the images on which the attack succeeds at most checkpoints (the hard ones); full eps.

    The score takes only as many values as there were checkpoints: equal scores at the cut are drawn at random.
    """
    return Selection(context.drop(context.score("robust-failure"), "high"), context.uniform_eps())


@strategy("input-gradient", prunes="high gradient", source="EasyCore, arXiv 2510.11018", needs=("input-gradient",))
def input_gradient(context: SelectionContext) -> Selection:
    """Drop the largest mean input-gradient norms (the hard ones); full eps."""
    return Selection(context.drop(context.score("input-gradient"), "high"), context.uniform_eps())


@strategy(
    "dynamic-uncertainty",
    prunes="low uncertainty",
    source="Nieth et al. 2024, arXiv 2406.13283; He et al. 2023, arXiv 2306.05175",
    needs=("dynamic-uncertainty",),
)
def dynamic_uncertainty(
    context: SelectionContext, *, features: Features | None = None, n_neighbors: int = 10
) -> Selection:
    """Drop the images whose probability of the label varies least over training; full eps.

    Rows without a score get the mean score of their ``n_neighbors`` nearest rows in ``features`` (an array ``[N, D]``
    or a .npy file); without features they are kept.
    """
    scores = context.score("dynamic-uncertainty")
    unscored = int(np.count_nonzero(np.isnan(scores)))
    if features is None or not unscored:
        return Selection(context.drop(scores, "low"), context.uniform_eps())
    n_neighbors = integer("n_neighbors", n_neighbors, low=1)
    scores = extrapolate(scores, read_features(features, len(context)), n_neighbors)
    return Selection(context.drop(scores, "low"), context.uniform_eps(), {"extrapolated": unscored})


@strategy("ccs", prunes="lowest margin, then any", source="Zheng et al. 2023, arXiv 2210.15809", needs=("margin",))
def ccs(context: SelectionContext, *, beta: float = 0.1, bins: int = 50) -> Selection:
    """Drop the share beta of lowest margins, then fill equal-width strata of the margin evenly; full eps.

    In each quota the share ``beta`` of hardest rows is removed first (never more than the quota). The range of the
    other margins is cut into ``bins`` of equal width, and the bins, smallest first, each keep ``remaining / remaining
    bins`` rows, drawn at random.
    """
    beta, bins = number("beta", beta, high=1), integer("bins", bins, low=1)
    keep = context.keep_all()
    for group in context.quotas:
        margin = context.margin[group.rows]
        rng = context.rng(1, group.code)
        present = int(np.count_nonzero(~np.isnan(margin)))
        removed = extreme(margin, min(int(np.floor(beta * present + 1e-9)), group.remove), "low", rng)
        rest = np.flatnonzero(~removed & ~np.isnan(margin))
        budget = max(len(rest) - (group.remove - int(np.count_nonzero(removed))), 0)
        removed[rest] = True
        removed[rest[_stratified(margin[rest], budget, bins, rng)]] = False
        keep[group.rows[removed]] = False
    return Selection(keep, context.uniform_eps())


def _stratified(margin: NDArray[np.float32], budget: int, bins: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of ``budget`` rows spread over equal-width bins of ``margin`` (-inf falls into the lowest bin)."""
    if not budget:
        return np.empty(0, np.int64)
    finite = margin[np.isfinite(margin)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    edges = np.linspace(low, high, bins + 1)[1:-1]
    stratum = np.searchsorted(edges, margin, side="right")
    order = np.argsort(stratum, kind="stable")
    sizes = np.bincount(stratum, minlength=bins)
    starts = np.cumsum(sizes) - sizes
    chosen = []
    for served, bin_ in enumerate(np.argsort(sizes, kind="stable")):
        take = min(int(sizes[bin_]), budget // (bins - served))
        members = order[starts[bin_] : starts[bin_] + sizes[bin_]]
        chosen.append(members if take == len(members) else rng.choice(members, take, replace=False))
        budget -= take
    return np.concatenate(chosen)


@strategy(
    "dedup", prunes="near-duplicates", source="Abbas et al. 2023, SemDeDup, arXiv 2303.09540", needs=("features",)
)
def dedup(context: SelectionContext, *, features: Features, cluster_rows: int = 1_000) -> Selection:
    """Drop the rows most similar (cosine) to a row farther from the centre of their k-means cluster; full eps.

    Clusters are made inside each quota (source and class), of about ``cluster_rows`` rows. SemDeDup drops rows above a
    similarity threshold; here the quota sets the threshold, so that plans of equal size can be compared.
    """
    cluster_rows = integer("cluster_rows", cluster_rows, low=2)
    vectors = read_features(features, len(context))
    similarity = np.full(len(context), np.nan, np.float32)
    for group in context.quotas:
        if group.remove:
            seed = int(context.rng(2, group.code).integers(2**31))
            similarity[group.rows] = duplicate_scores(vectors[group.rows], cluster_rows, seed)
    return Selection(context.drop(similarity, "high"), context.uniform_eps())


def duplicate_scores(
    features: NDArray[np.floating[Any]], cluster_rows: int = 1_000, seed: int = 0
) -> NDArray[np.float32]:
    """Redundancy of each row: the largest cosine to a row of its cluster that is ranked before it.

    Rows of a cluster are ranked from far from its centre to near (SemDeDup keeps the outlying of two duplicates); a row
    is compared with those ranked before it, so that of a set of duplicates one stays.

    Args:
        features: ``[n, D]``, of any length but 0.
        cluster_rows: rows in a k-means cluster, about.
        seed: for k-means.

    Returns:
        float32 ``[n]`` in [-1, 1], higher = more redundant; the first of each cluster has -1.
    """
    from sklearn.cluster import MiniBatchKMeans

    unit = np.array(features, dtype=np.float32)
    lengths = np.linalg.norm(unit, axis=1, keepdims=True)
    unit /= np.where(lengths > 0, lengths, np.float32(1))
    clusters = max(1, round(len(unit) / cluster_rows))
    if clusters == 1:
        cluster, centers = np.zeros(len(unit), np.int64), unit.mean(axis=0, keepdims=True)
    else:
        means = MiniBatchKMeans(clusters, random_state=seed, n_init=1, batch_size=max(4_096, 2 * clusters)).fit(unit)
        cluster, centers = means.labels_, means.cluster_centers_
    nearness = np.einsum("nd,nd->n", unit, centers[cluster])
    order = np.lexsort((nearness, cluster))
    scores = np.full(len(unit), -1, np.float32)
    stops = np.cumsum(np.bincount(cluster, minlength=len(centers)))
    for start, stop in zip(np.concatenate([[0], stops[:-1]]), stops, strict=True):
        rows = order[start:stop]
        for first in range(0, len(rows), BLOCK):
            block = rows[first : first + BLOCK]
            cosine = unit[block] @ unit[rows[: first + len(block)]].T  # [b, rows so far]
            place = np.arange(first, first + len(block))
            cosine[np.arange(cosine.shape[1])[None, :] >= place[:, None]] = -1
            scores[block] = cosine.max(axis=1)
    return np.clip(scores, -1, 1, out=scores)
