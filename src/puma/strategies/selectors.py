"""Selectors from the literature: scores of a training run, coverage of the margin, near-duplicates of features.

A folder of feature vectors (`puma.scoring.snapshots.embed`) holds ``part-000000.npy``, ..., the SHA-256 of each in a
dot file beside it, and a record ``features.json``: fingerprint of the pool and SHA-256 of the model's weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, first_line
from puma.io import read_record, require_digest, spans
from puma.strategies.registry import Count, Selection, SelectionContext, Share, extreme, strategy

Vectors = NDArray[np.floating[Any]]
Features = Vectors | str | Path
RECORD = "features.json"
_NIETH = "Nieth et al. 2024, arXiv 2406.13283; He et al. 2023, arXiv 2306.05175"
_BLOCK, _UNKNOWN_BLOCK = 1_024, 8_192
_EMBED = "puma score-run RUN --features DIR"


@strategy("el2n-adv", prunes="low error", source="Paul et al. 2021, arXiv 2107.07075", needs=("el2n-adv",))
def el2n_adv(context: SelectionContext) -> Selection:
    """Drop the lowest EL2N error on adversarial images (the easy ones); full eps."""
    return Selection(context.drop(context.score("el2n-adv"), "low"), context.uniform_eps())


@strategy("robust-failure", prunes="high frequency", source="arXiv 2102.07437", needs=("robust-failure",))
def robust_failure(context: SelectionContext) -> Selection:
    """Drop the images on which the attack succeeds at most checkpoints (the hard ones); full eps."""
    return Selection(context.drop(context.score("robust-failure"), "high"), context.uniform_eps())


@strategy("input-gradient", prunes="high gradient", source="EasyCore, arXiv 2510.11018", needs=("input-gradient",))
def input_gradient(context: SelectionContext) -> Selection:
    """Drop the largest mean input-gradient norms (the hard ones); full eps."""
    return Selection(context.drop(context.score("input-gradient"), "high"), context.uniform_eps())


@strategy("dynamic-uncertainty", prunes="low uncertainty", source=_NIETH, needs=("dynamic-uncertainty",))
def uncertainty(context: SelectionContext, *, features: Features | None = None, n_neighbors: Count = 10) -> Selection:
    """Drop the images whose probability of the label varies least over training; full eps.

    Rows without a score get the mean of their ``n_neighbors`` nearest in ``features``; without features they are kept.
    """
    scores, derived = context.score("dynamic-uncertainty"), {}
    if features is not None and (unscored := int(np.count_nonzero(np.isnan(scores)))):
        derived = {"extrapolated": unscored}
        scores = extrapolate(scores, read_features(features, len(context)), n_neighbors)
    return Selection(context.drop(scores, "low"), context.uniform_eps(), derived)


@strategy("ccs", prunes="lowest margin, then any", source="Zheng et al. 2023, arXiv 2210.15809", needs=("margin",))
def ccs(context: SelectionContext, *, beta: Share = 0.1, bins: Count = 50) -> Selection:
    """Drop the share beta of lowest margins, then fill equal-width strata of the margin evenly; full eps.

    In each quota the range of the other margins is cut into ``bins`` of equal width; the bins, smallest first, each
    keep ``remaining / remaining bins`` rows, drawn at random.
    """
    keep = context.keep_all()
    for code, rows, remove in context.quotas:
        margin, rng = context.margin[rows], context.rng(1, code)
        present = int(np.count_nonzero(~np.isnan(margin)))
        removed = extreme(margin, min(int(np.floor(beta * present + 1e-9)), remove), "low", rng)
        rest = np.flatnonzero(~removed & ~np.isnan(margin))
        budget = max(len(rest) + int(np.count_nonzero(removed)) - remove, 0)
        removed[rest] = True
        removed[rest[_stratified(margin[rest], budget, bins, rng)]] = False
        keep[rows[removed]] = False
    return Selection(keep, context.uniform_eps())


def _stratified(margin: NDArray[np.float32], budget: int, bins: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of ``budget`` rows spread over equal-width bins of ``margin`` (-inf falls into the lowest bin)."""
    if not budget:
        return np.empty(0, np.int64)
    finite = margin[np.isfinite(margin)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    stratum = np.searchsorted(np.linspace(low, high, bins + 1)[1:-1], margin, side="right")
    order, sizes = np.argsort(stratum, kind="stable"), np.bincount(stratum, minlength=bins)
    starts, chosen = np.cumsum(sizes) - sizes, []
    for served, bin_ in enumerate(np.argsort(sizes, kind="stable")):
        take = min(int(sizes[bin_]), budget // (bins - served))
        members = order[starts[bin_] : starts[bin_] + sizes[bin_]]
        chosen.append(members if take == len(members) else rng.choice(members, take, replace=False))
        budget -= take
    return np.concatenate(chosen)


@strategy("dedup", prunes="near-duplicates", source="SemDeDup, arXiv 2303.09540", needs=("features",))
def dedup(context: SelectionContext, *, features: Features, cluster_rows: Count = 1_000) -> Selection:
    """Drop the rows most similar (cosine) to a row farther from the centre of their k-means cluster; full eps.

    Clusters of about ``cluster_rows`` rows are made in each quota, which sets SemDeDup's threshold of similarity.
    """
    vectors = read_features(features, len(context))
    similarity = np.full(len(context), np.nan, np.float32)
    for code, rows, remove in context.quotas:
        if remove:
            seed = int(context.rng(2, code).integers(2**31))
            similarity[rows] = duplicate_scores(vectors[rows], cluster_rows, seed)
    return Selection(context.drop(similarity, "high"), context.uniform_eps())


def duplicate_scores(features: Vectors, cluster_rows: int = 1_000, seed: int = 0) -> NDArray[np.float32]:
    """Redundancy of each row of ``features`` ``[n, D]``: the largest cosine to a row of its cluster ranked before it.

    Rows of a k-means cluster (about ``cluster_rows``) are ranked from far from its centre to near (SemDeDup keeps the
    outlying of two duplicates). float32 ``[n]`` in [-1, 1], higher = more redundant; -1 for the first of each cluster.
    """
    from sklearn.cluster import MiniBatchKMeans

    unit = np.array(features, dtype=np.float32)
    lengths = np.linalg.norm(unit, axis=1, keepdims=True)
    unit /= np.where(lengths > 0, lengths, np.float32(1))
    if (clusters := max(1, round(len(unit) / cluster_rows))) == 1:
        cluster, centers = np.zeros(len(unit), np.int64), unit.mean(axis=0, keepdims=True)
    else:
        means = MiniBatchKMeans(clusters, random_state=seed, n_init=1, batch_size=max(4_096, 2 * clusters)).fit(unit)
        cluster, centers = means.labels_, means.cluster_centers_
    order = np.lexsort((np.einsum("nd,nd->n", unit, centers[cluster]), cluster))
    scores = np.full(len(unit), -1, np.float32)
    stops = np.cumsum(np.bincount(cluster, minlength=len(centers)))
    for start, stop in zip(np.concatenate([[0], stops[:-1]]), stops, strict=True):
        rows = order[start:stop]
        for first in range(0, len(rows), _BLOCK):
            block = rows[first : first + _BLOCK]
            cosine = unit[block] @ unit[rows[: first + len(block)]].T  # [b, rows so far]
            cosine[np.arange(cosine.shape[1]) >= first + np.arange(len(block))[:, None]] = -1
            scores[block] = cosine.max(axis=1)
    return np.clip(scores, -1, 1, out=scores)


def read_features(features: Features, rows: int, pool: str | None = None) -> Vectors:
    """Feature vectors ``[rows, D]``, from an array, a .npy file (mapped, not loaded) or a folder of .npy parts.

    `DataError` if they are missing, broken, of another shape or kind, or of another ``pool`` (fingerprint).
    """
    array: Any = features
    if isinstance(features, (str, Path)):
        path, record = Path(features), Path(features) / RECORD
        theirs = str(dict(read_record(record)["settings"]).get("pool", pool)) if record.is_file() else str(pool)
        if pool is not None and theirs != pool:
            why = f"they are of the pool {theirs[:12]}, the table of {pool[:12]}"
            fix = f"embed the table's own pool with `{_EMBED}`"
            raise DataError(f"{path} holds features of another pool", why=why, fix=fix)
        arrays = []
        for part in sorted(path.glob("part-*.npy")) or [path]:
            require_digest(part, f"run `{_EMBED}` again: it makes only what does not fit")
            try:
                arrays.append(np.load(part, mmap_mode="r", allow_pickle=False))
            except (ValueError, OSError, EOFError) as error:
                raise DataError(f"{part} is not a .npy file", why=str(error), fix=f"`{_EMBED}` makes one") from None
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    array = np.asanyarray(array)
    if array.ndim != 2 or len(array) != rows or not np.issubdtype(array.dtype, np.floating):
        what = f"features of shape {array.shape} and type {array.dtype} do not fit"
        raise DataError(what, why=f"they have to be float, one vector for each of the pool's {rows} images")
    return array  # type: ignore[no-any-return]  # checked above


def extrapolate(scores: NDArray[np.float32], features: Vectors, n_neighbors: int = 10) -> NDArray[np.float32]:
    """Give every row without a score (NaN) the mean of its nearest scored rows (Nieth et al., arXiv 2406.13283).

    Distances are Euclidean in ``features`` ``[N, D]``. `DataError` if no row has a score, or a feature is not finite.
    """
    from sklearn.neighbors import KNeighborsRegressor

    filled = np.array(scores, dtype=np.float32)
    known, unknown = np.flatnonzero(~np.isnan(filled)), np.flatnonzero(np.isnan(filled))
    if not len(known):
        raise DataError("no row has a score to extrapolate from")
    try:
        nearest = KNeighborsRegressor(min(n_neighbors, len(known)))
        nearest.fit(np.asarray(features[known]), scores[known].astype(np.float64))
        for span in spans(len(unknown), _UNKNOWN_BLOCK):
            rows = unknown[span]
            filled[rows] = nearest.predict(np.asarray(features[rows]))
    except ValueError as error:
        raise DataError("the features hold NaN or infinite values", why=first_line(error)) from None
    return filled
