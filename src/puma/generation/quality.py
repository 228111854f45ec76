"""Quality of synthetic images, measured against real ones: labels, usefulness, copying, variety, statistics.

No single number tells a good generator (one that repeats its training images has perfect labels), so every measure
comes with its value for real test images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from puma.data.source import Source, stratified_rows
from puma.errors import DataError
from puma.rng import mixed_key, permuted

SCHEMA = "puma.quality/1"
Floats = NDArray[np.float64]
Features = Callable[[NDArray[np.uint8]], Floats]
_NEIGHBORS = 5  # of coverage, as in its paper
_PIXEL_DIMENSIONS, _COMPONENTS = 256, 64  # beyond so many pixels, principal components of the training images


class _Set(NamedTuple):
    pixels: Floats  # [N, D] in [0, 1]
    features: Floats  # [N, F]
    labels: NDArray[np.int64]

    def some(self, size: int) -> NDArray[np.int64]:
        """``size`` rows by class, never a prefix: files of generated images come sorted by class and confidence."""
        return stratified_rows(self.labels, size, seed=0)


def measure(
    train: Source,
    test: Source,
    synthetic: Source,
    *,
    features: Features | None = None,
    features_name: str = "given by the caller",
    limit: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure ``synthetic`` images of a generator trained on ``train``; ``test`` are real images it never saw.

    All three have the same shape and classes; at most ``limit`` rows of each are used (stratified by ``seed``).
    ``features``, uint8 [N, H, W, C] -> float [N, F], are for the classifiers, coverage and Frechet distance; None takes
    the pixels themselves, or their 64 principal components where there are more than 256.

    Returns:
        JSON. Accuracies and shares in [0, 1]; distances are Euclidean, pixels in [0, 1].
        ``label_agreement``: accuracy of a classifier trained on ``train`` on the synthetic images (higher is better;
        ``real_accuracy`` is the same classifier's on ``test``). ``synthetic_trained_accuracy``: the other way round.
        ``neighbor``: distances to the nearest training image; a mean below that of ``test`` hints at memorising, and
        ``copies`` is the share that is nearer than all but 1 % of test images.
        ``coverage``: per class, see `coverage`; ``frechet``: see `frechet_distance`; both with ``test`` as reference.

    Raises:
        DataError: sources of different shape or number of classes, or too few images to say anything.
    """
    check_comparable(train, test, synthetic)
    sets, described = [], {}
    for role, source in (("train", train), ("test", test), ("synthetic", synthetic)):
        rows = stratified_rows(source.labels, limit, seed) if len(source) > limit else np.arange(len(source))
        images = source.read(rows)
        if features is None:
            features, features_name = _pixel_features(images)
        sets.append(_Set(_flat(images), features(images), source.labels[rows]))
        sizes = {"rows": len(source), "used": len(images)}
        described[role] = {"name": source.name, "fingerprint": source.fingerprint, **sizes}
    fitted, unseen, made = sets
    size = min(len(unseen.labels), len(made.labels))
    frechet = {
        role: frechet_distance(fitted.features, one.features[one.some(size)])
        for role, one in (("synthetic", made), ("test", unseen))
    }
    return {
        "schema": SCHEMA,
        "sources": described,
        "seed": seed,
        "features": features_name,
        **_accuracies(fitted, unseen, made, train.class_names),
        "neighbor": _neighbors(fitted, unseen, made),
        "coverage": _coverages(fitted, unseen, made, train.class_names),
        "frechet": frechet
        | {"dimensions": fitted.features.shape[1], "rows": {"train": len(fitted.features), "other": size}},
    }


def check_comparable(train: Source, *others: Source) -> None:
    """Refuse (`DataError`) other image shapes or numbers of classes, or too few images."""
    for other in others:
        if other.image_shape != train.image_shape or other.num_classes != train.num_classes:
            ours, theirs = (f"images {one.image_shape} in {one.num_classes} classes" for one in (other, train))
            fix = "load both with the same resize= and the same classes"
            raise DataError(f"{other.name} cannot be compared with {train.name}", why=f"{ours}; {theirs}", fix=fix)
    for one in (train, *others):
        if len(one) < 2 * one.num_classes:
            raise DataError(f"{one.name} has only {len(one)} images for {one.num_classes} classes: too few to measure")


def nearest(points: Floats, others: Floats, k: int = 1) -> Floats:
    """Euclidean distance of each point to its k-th nearest neighbor in ``others``; float64 [N].

    >>> nearest(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 4.0]])).tolist()
    [1.0, 0.0]
    """
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=k).fit(others).kneighbors(points)
    return np.asarray(distances[:, -1], dtype=np.float64)


def coverage(real: Floats, fake: Floats, k: int = _NEIGHBORS) -> float:
    """Share of real points with a fake point nearer than their k-th real neighbor (Naeem et al. 2020, 2002.09797).

    In [0, 1], higher is more varied; it grows with the number of fake points, so compare at equal numbers.

    >>> line = np.arange(10.0)[:, None]
    >>> coverage(line, line + 0.1), coverage(line, np.zeros((10, 1)), k=1)
    (1.0, 0.1)
    """
    if len(real) < 2:
        return float("nan")
    reach = nearest(real, real, min(k, len(real) - 1) + 1)  # the first neighbor is the point itself
    return float((nearest(real, fake) < reach).mean())


def frechet_distance(first: Floats, second: Floats) -> float:
    """``|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of two sets of features [N, F] (arXiv 1706.08500).

    0 for equal moments, and biased upwards by about F / N: compare only at equal numbers of points.
    """
    gap = first.mean(0) - second.mean(0)
    one, two = (np.atleast_2d(np.cov(points, rowvar=False)) for points in (first, second))
    # Tr (C1 C2)^(1/2) through the symmetric C1^(1/2) C2 C1^(1/2), whose eigenvalues are real.
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ two @ root), 0, None)).sum()
    return float(gap @ gap + np.trace(one) + np.trace(two) - 2 * cross)


def _flat(images: NDArray[np.uint8]) -> Floats:
    return images.reshape(len(images), -1) / 255.0


def _pixel_features(images: NDArray[np.uint8]) -> tuple[Features, str]:
    """Pixels in [0, 1], or their principal components over ``images``."""
    size = int(np.prod(images.shape[1:]))
    if size <= _PIXEL_DIMENSIONS:
        return _flat, f"the {size} pixels in [0, 1]"
    from sklearn.decomposition import PCA

    components = min(_COMPONENTS, len(images))
    fitted = PCA(components, svd_solver="randomized", random_state=0).fit(_flat(images))
    name = f"{components} principal components of the training images' {size} pixels"
    return lambda pixels: np.asarray(fitted.transform(_flat(pixels))), name


def _accuracies(train: _Set, test: _Set, synthetic: _Set, names: Sequence[str]) -> dict[str, Any]:
    from sklearn.svm import SVC

    of_real = SVC(C=10.0).fit(train.features, train.labels)
    of_synthetic = SVC(C=10.0).fit(synthetic.features, synthetic.labels)
    agrees = of_real.predict(synthetic.features) == synthetic.labels
    by_class = {
        name: float(agrees[rows].mean()) if (rows := synthetic.labels == label).any() else None
        for label, name in enumerate(names)
    }
    return {
        "classifier": "scikit-learn SVC, RBF kernel, C=10, gamma scale",
        "real_accuracy": float(of_real.score(test.features, test.labels)),
        "label_agreement": float(agrees.mean()),
        "label_agreement_by_class": by_class,
        "synthetic_trained_accuracy": float(of_synthetic.score(test.features, test.labels)),
    }


def _neighbors(train: _Set, test: _Set, synthetic: _Set) -> dict[str, Any]:
    """Distances in pixel space, where a copy is a copy whatever the features are."""
    ours, theirs = nearest(synthetic.pixels, train.pixels), nearest(test.pixels, train.pixels)
    # Train and test as references of equal size: a generator of the true distribution is near both alike.
    size = min(len(train.labels), len(test.labels))
    to_train, to_test = (nearest(synthetic.pixels, one.pixels[one.some(size)]) for one in (train, test))
    return {
        "unit": "Euclidean distance, pixels in [0, 1]",
        "synthetic_to_train": _spread(ours),
        "test_to_train": _spread(theirs),
        "ratio_of_means": float(ours.mean() / theirs.mean()) if theirs.mean() > 0 else None,
        "closer_to_train_than_to_test": float((to_train < to_test).mean()),
        "copies": float((ours < np.quantile(theirs, 0.01)).mean()),  # nearer than all but 1 % of test images
    }


def _coverages(train: _Set, test: _Set, synthetic: _Set, names: Sequence[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"neighbors": _NEIGHBORS, "synthetic": {}, "test": {}, "rows": {}}
    for label, name in enumerate(names):
        real, *others = (one.features[one.labels == label] for one in (train, test, synthetic))
        size = min(len(points) for points in others)
        result["rows"][name] = size
        for role, points in zip(("test", "synthetic"), others, strict=True):
            value = np.nan
            if size:
                value = coverage(real, points[permuted(np.arange(size), len(points), mixed_key(0, label))])
            result[role][name] = None if np.isnan(value) else value
    return result


def _spread(distances: Floats) -> dict[str, float]:
    values = distances.mean(), np.median(distances), np.quantile(distances, 0.05), distances.min()
    return dict(zip(("mean", "median", "q05", "least"), map(float, values), strict=True))
