"""Data sets in layouts of their own: scikit-learn's bundled digits."""

from __future__ import annotations

import hashlib

import numpy as np

from puma.data.sampler import stratified_rows
from puma.data.source import Source, in_memory
from puma.errors import unknown

_DIGITS_TRAIN_ROWS = 898


def load_digits(split: str = "train") -> Source:
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
        train = stratified_rows(labels, _DIGITS_TRAIN_ROWS, seed=0)
        rows = train if split == "train" else np.setdiff1d(rows, train)
    images, labels = images[rows], labels[rows]
    name = "digits" if split == "train" else f"digits-{split}"
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes())
    return Source(in_memory(images), labels, name=name, fingerprint=digest.hexdigest(), spec=f"digits:{split}")
