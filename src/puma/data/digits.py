"""scikit-learn's bundled handwritten digits: 1,797 real images of 8x8, no download."""

from __future__ import annotations

import hashlib

import numpy as np

from puma.data.images import ArrayImages
from puma.data.source import ImageSource
from puma.data.stratified import stratified_rows
from puma.errors import unknown

_TRAIN_ROWS = 898


def load_digits(split: str = "train") -> ImageSource:
    """The digits: ``"train"`` (898 images), ``"test"`` (899) or ``"all"``; 8x8x1, 17 grey levels over 0..255.

    The split is stratified and fixed: it does not depend on a random number generator.

    Raises:
        UsageError: another split.
    """
    if split not in ("train", "test", "all"):
        raise unknown("split of digits", split, ("train", "test", "all"))
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    rows = np.arange(len(labels))
    if split != "all":
        train = stratified_rows(labels, _TRAIN_ROWS, seed=0)
        rows = train if split == "train" else np.setdiff1d(rows, train)
    images, labels = images[rows], labels[rows]
    return ImageSource(
        ArrayImages(images),
        labels,
        name="digits" if split == "train" else f"digits-{split}",
        fingerprint=hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest(),
        spec=f"digits:{split}",
    )
