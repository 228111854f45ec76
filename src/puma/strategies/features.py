"""Feature vectors of a pool's images, and scores extrapolated along them to rows that have none.

A folder of vectors (`puma.scoring.embed`) holds ``part-000000.npy``, ..., the SHA-256 of each in a dot file beside it,
and a record ``features.json``: fingerprint of the pool and SHA-256 of the model's weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError
from puma.io import read_record, recorded_sha256, sha256_file

Features = NDArray[np.floating[Any]] | str | Path
BLOCK = 8_192
RECORD = "features.json"


def read_features(features: Features, rows: int, pool: str | None = None) -> NDArray[np.floating[Any]]:
    """Feature vectors ``[rows, D]``, from an array, a .npy file (mapped, not loaded) or a folder of .npy parts.

    Args:
        features: where they are.
        rows: images of the pool.
        pool: fingerprint of the pool, held against the folder's record.

    Raises:
        DataError: the file is missing or broken, the folder's record names another pool or other bytes, or the array
            has another shape or kind.
    """
    array: Any = features
    if isinstance(features, (str, Path)):
        path = Path(features)
        parts = sorted(path.glob("part-*.npy")) if path.is_dir() else [path]
        if pool is not None and path.is_dir():
            _refuse_other_pool(path, pool)
        for part in parts:
            check_part(part)
        arrays = [_load(part) for part in parts or [path]]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    array = np.asanyarray(array)
    if array.ndim != 2 or len(array) != rows or not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"features of shape {array.shape} and type {array.dtype} do not fit",
            why=f"they have to be float, one vector for each of the pool's {rows} images",
        )
    return array  # type: ignore[no-any-return]


def check_part(path: Path) -> bool:
    """Compare a part with its recorded SHA-256; False where there is none to compare.

    Raises:
        DataError: the bytes are others.
    """
    if not path.is_file() or not (expected := recorded_sha256(path)):
        return False
    if (digest := sha256_file(path)) not in expected:
        raise DataError(
            f"{path} is damaged, or was made again by another program: its checksum is not the recorded one",
            why=f"sha256 {digest[:12]} now, {expected[-1][:12]} then",
            fix="run `puma score-run RUN --features DIR` again: it makes only what does not fit",
        )
    return True


def _refuse_other_pool(folder: Path, pool: str) -> None:
    if (theirs := _record(folder).get("pool", pool)) != pool:
        raise DataError(
            f"{folder} holds features of another pool",
            why=f"they are of the pool {theirs[:12]}, the table of {pool[:12]}",
            fix="embed the table's own pool with `puma score-run RUN --features DIR`",
        )


def _record(folder: Path) -> dict[str, Any]:
    """The settings recorded beside the parts; nothing where the vectors were not made by `puma.scoring.embed`."""
    path = folder / RECORD
    return dict(read_record(path)["settings"]) if path.is_file() else {}


def _load(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", fix="`puma score-run RUN --features DIR` makes one") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a .npy file", why=str(error)) from None


def extrapolate(
    scores: NDArray[np.float32], features: NDArray[np.floating[Any]], n_neighbors: int = 10
) -> NDArray[np.float32]:
    """Give every row without a score the mean score of its nearest scored rows (Nieth et al., arXiv 2406.13283).

    Args:
        scores: float ``[N]``, NaN where there is none.
        features: ``[N, D]``; distances are Euclidean.
        n_neighbors: how many scored rows are averaged (fewer if there are fewer).

    Returns:
        float32 ``[N]`` without NaN; rows that had a score keep it.

    Raises:
        DataError: no row has a score, or a feature is NaN or infinite.

    >>> extrapolate(np.float32([1, 3, np.nan]), np.array([[0.0], [10.0], [9.0]]), n_neighbors=1)
    array([1., 3., 3.], dtype=float32)
    """
    from sklearn.neighbors import NearestNeighbors

    known = np.flatnonzero(~np.isnan(scores))
    unknown = np.flatnonzero(np.isnan(scores))
    if not len(known):
        raise DataError("no row has a score to extrapolate from")
    reference = np.asarray(features[known])
    if not np.isfinite(reference).all():
        raise DataError("the features hold NaN or infinite values")
    search = NearestNeighbors(n_neighbors=min(n_neighbors, len(known))).fit(reference)
    filled = np.array(scores, dtype=np.float32)
    for start in range(0, len(unknown), BLOCK):
        rows = unknown[start : start + BLOCK]
        block = np.asarray(features[rows])
        if not np.isfinite(block).all():
            raise DataError("the features hold NaN or infinite values")
        near = search.kneighbors(block, return_distance=False)
        filled[rows] = scores[known[near]].mean(axis=1, dtype=np.float64)
    return filled
