"""Quality of synthetic images, measured against real ones: labels, usefulness, copying, variety.

No single number tells a good generator (one that repeats its training images has perfect labels), so every measure
comes with its value for real test images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.source import Source, stratified_rows
from puma.errors import DataError
from puma.rng import mixed_key, permuted

SCHEMA = "puma.quality/1"
Floats = NDArray[np.float64]
_ROLES = ("train", "test", "synthetic")
_PIXEL_DIMENSIONS, _COMPONENTS = 256, 64  # beyond so many pixels, principal components of the training images


def measure(train: Source, test: Source, synthetic: Source, *, limit: int = 10_000) -> dict[str, Any]:
    """Measure ``synthetic`` images of a generator trained on ``train``; ``test`` are real images it never saw.

    At most ``limit`` rows of each are used, stratified. The features of classifiers and coverage are the pixels, or
    their 64 principal components where there are more than 256.

    Returns:
        JSON; accuracies and shares in [0, 1]. ``label_agreement``: accuracy of a classifier trained on ``train`` on the
        synthetic images (``real_accuracy``: on ``test``). ``synthetic_trained_accuracy``: the other way round.
        ``neighbor``: Euclidean distances to the nearest training image, pixels in [0, 1]; a mean below that of ``test``
        hints at memorising, and ``copies`` is the share that is nearer than all but 1 % of test images.
        ``coverage``: per class, see `coverage`, of ``train`` by as many synthetic images as test images.
    """
    from sklearn.svm import SVC

    check_comparable(train, test, synthetic)
    pixels, labels, described = list[Floats](), list[NDArray[np.int64]](), {}
    for role, source in zip(_ROLES, (train, test, synthetic), strict=True):
        rows = stratified_rows(source.labels, limit, 0) if len(source) > limit else np.arange(len(source))
        pixels.append(source.read(rows).reshape(len(rows), -1) / 255.0)
        labels.append(source.labels[rows])
        sizes = {"rows": len(source), "used": len(rows)}
        described[role] = {"name": source.name, "fingerprint": source.fingerprint, **sizes}
    features, name = _features(pixels)
    of_real, of_synthetic = (SVC(C=10.0).fit(features[place], labels[place]) for place in (0, 2))
    ours, theirs = nearest(pixels[2], pixels[0]), nearest(pixels[1], pixels[0])  # a copy is a copy of pixels
    return {
        "schema": SCHEMA,
        "sources": described,
        "features": name,
        "classifier": "scikit-learn SVC, RBF kernel, C=10, gamma scale",
        "real_accuracy": float(of_real.score(features[1], labels[1])),
        "label_agreement": float((of_real.predict(features[2]) == labels[2]).mean()),
        "synthetic_trained_accuracy": float(of_synthetic.score(features[1], labels[1])),
        "neighbor": {
            "synthetic_to_train": {"mean": float(ours.mean())},
            "test_to_train": {"mean": float(theirs.mean())},
            "copies": float((ours < np.quantile(theirs, 0.01)).mean()),
        },
        "coverage": _coverages(features, labels, train.class_names),
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
    """Euclidean distance of each point to its k-th nearest neighbor in ``others``; float64 [N]."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=k).fit(others).kneighbors(points)
    return np.asarray(distances[:, -1], dtype=np.float64)


def coverage(real: Floats, fake: Floats, k: int = 5) -> float:
    """Share of real points with a fake point nearer than their k-th real neighbor (Naeem et al. 2020, 2002.09797).

    In [0, 1], higher is more varied; it grows with the number of fake points, so compare at equal numbers.
    """
    reach = nearest(real, real, min(k, len(real) - 1) + 1)  # the first neighbor is the point itself
    return float((nearest(real, fake) < reach).mean())


def _features(pixels: list[Floats]) -> tuple[list[Floats], str]:
    size, components = pixels[0].shape[1], min(_COMPONENTS, len(pixels[0]))
    if size <= _PIXEL_DIMENSIONS:
        return pixels, f"the {size} pixels in [0, 1]"
    from sklearn.decomposition import PCA

    fitted = PCA(components, svd_solver="randomized", random_state=0).fit(pixels[0])
    name = f"{components} principal components of the training images' {size} pixels"
    return [np.asarray(fitted.transform(one)) for one in pixels], name


def _coverages(features: list[Floats], labels: list[NDArray[np.int64]], names: tuple[str, ...]) -> dict[str, Any]:
    """By class, at equal numbers; None for a class with fewer than two training images or no others."""
    result: dict[str, dict[str, float | None]] = {"synthetic": {}, "test": {}}
    for label, name in enumerate(names):
        real, *others = (values[own == label] for values, own in zip(features, labels, strict=True))
        size = min(len(points) for points in others)
        for role, points in zip(_ROLES[1:], others, strict=True):
            rows = permuted(np.arange(size), len(points), mixed_key(0, label))
            result[role][name] = coverage(real, points[rows]) if size and len(real) > 1 else None
    return result
