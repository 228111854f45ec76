"""How far to trust the labels of images, from the class probabilities that a model gives them.

Two columns beside the margins. ``agreement``: does the margin model give the image its label, and how surely.
``confident-learning``: the flags of Northcutt, Jiang and Chuang 2021 (arXiv 1911.00068, sections 3.1 and 3.2). On a
synthetic image a wrong label is likelier than on a real one, since it is what the generator was asked for and nobody
looked. The paper wants probabilities of images that the model was not trained on; a model trained on the synthetic
images has learnt some of their wrong labels by heart and flags fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.errors import DataError

AGREEMENT, CONFIDENT_LEARNING = "agreement", "confident-learning"


def agreement(probabilities: ArrayLike, labels: ArrayLike) -> NDArray[np.float32]:
    """Probability of the label minus the largest other one.

    Args:
        probabilities: ``[N, K]``, rows that sum to 1.
        labels: ``[N]``, in ``[0, K)``.

    Returns:
        float32 ``[N]`` in [-1, 1]; positive where the model's class is the label, higher = surer of the label.

    >>> agreement([[0.7, 0.3], [0.25, 0.75]], [0, 0]).tolist()
    [0.4000000059604645, -0.5]

    Raises:
        DataError: not probabilities, or labels out of range.
    """
    checked, given = _checked(probabilities, labels)
    rows = np.arange(len(given))
    own = checked[rows, given]
    others = checked.copy()
    others[rows, given] = -np.inf
    return np.asarray(own - others.max(1), dtype=np.float32)


def class_thresholds(own: ArrayLike, labels: ArrayLike, num_classes: int) -> NDArray[np.float64]:
    """How sure the model is, on average, of the images that carry each label (the paper's ``t_j``).

    Args:
        own: ``[N]``, probability of each image's own label.
        labels: ``[N]``.
        num_classes: K.

    Returns:
        float64 ``[K]`` in [0, 1]; infinite for a class without an image: nothing can be counted to it.
    """
    given = np.asarray(labels)
    counts = np.bincount(given, minlength=num_classes)
    total = np.bincount(given, weights=np.asarray(own, np.float64), minlength=num_classes)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, total / counts, np.inf)


@dataclass(frozen=True)
class Ranked:
    """The most probable classes of each image: all that confident learning needs to keep of N x K probabilities.

    Args:
        classes: int16 ``[N, M]``, most probable first.
        probabilities: float32 ``[N, M]``.
    """

    classes: NDArray[np.int16]
    probabilities: NDArray[np.float32]

    @classmethod
    def of(cls, probabilities: ArrayLike, most: int = 8) -> Ranked:
        """The ``most`` most probable classes; of equal ones the one with the lower number first."""
        values = np.asarray(probabilities, np.float32)
        order = np.argsort(-values, axis=1, kind="stable")[:, :most]
        return cls(order.astype(np.int16), np.take_along_axis(values, order, 1))

    def exact(self, thresholds: NDArray[np.float64], num_classes: int) -> bool:
        """Whether the classes that were left out cannot matter: each has at most 1 / (M + 1)."""
        kept = self.classes.shape[1]
        return kept >= num_classes or bool(thresholds.min() > 1 / (kept + 1))

    def counted_to(self, thresholds: NDArray[np.float64]) -> NDArray[np.int16]:
        """The class each image is confidently counted to: the most probable of those that reach their threshold.

        Returns:
            int16 ``[N]``; -1 where no class does.
        """
        reached = self.probabilities >= thresholds[self.classes]
        first = reached.argmax(1)
        chosen = np.take_along_axis(self.classes, first[:, None], 1)[:, 0]
        return np.where(reached.any(1), chosen, -1).astype(np.int16)


def confident_learning(
    probabilities: ArrayLike, labels: ArrayLike, thresholds: NDArray[np.float64] | None = None
) -> NDArray[np.bool_]:
    """Which labels are probably wrong: images confidently counted to another class than their label's.

    Args:
        probabilities: ``[N, K]``, rows that sum to 1.
        labels: ``[N]``, in ``[0, K)``.
        thresholds: ``[K]``; default `class_thresholds` of these images.

    Returns:
        bool ``[N]``, True = suspect.

    Raises:
        DataError: not probabilities, or labels out of range.
    """
    checked, given = _checked(probabilities, labels)
    if thresholds is None:
        own = checked[np.arange(len(given)), given]
        thresholds = class_thresholds(own, given, checked.shape[1])
    counted = Ranked.of(checked, checked.shape[1]).counted_to(thresholds)
    return np.asarray((counted >= 0) & (counted != given))


def confident_joint(counted: ArrayLike, labels: ArrayLike, num_classes: int) -> NDArray[np.float64]:
    """Estimated joint distribution of given label (row) and true class (column), as in section 3.1.

    Args:
        counted: ``[N]``, `Ranked.counted_to`.
        labels: ``[N]``.
        num_classes: K.

    Returns:
        float64 ``[K, K]``, sums to 1; its off-diagonal sum is the estimated share of wrong labels.
    """
    to, given = np.asarray(counted), np.asarray(labels)
    joint = np.zeros((num_classes, num_classes))
    np.add.at(joint, (given[to >= 0], to[to >= 0]), 1)
    counts = np.bincount(given, minlength=num_classes).astype(np.float64)
    empty = (joint.sum(1) == 0) & (counts > 0)
    joint[empty, empty] = 1  # no image of this label was counted anywhere: nothing speaks against the label
    rows = joint.sum(1, keepdims=True)
    joint = np.divide(joint, rows, out=np.zeros_like(joint), where=rows > 0) * counts[:, None]
    return np.asarray(joint / joint.sum())


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values, given = np.asarray(probabilities, np.float64), np.asarray(labels)
    if values.ndim != 2 or given.shape != values.shape[:1]:
        raise DataError(f"probabilities {values.shape} for labels {given.shape}", why="they are [N, K] and [N]")
    if not (np.isfinite(values).all() and (values >= 0).all() and np.allclose(values.sum(1), 1, atol=1e-3)):
        raise DataError(
            "these are not probabilities: rows have to be non-negative and sum to 1", fix="take the softmax"
        )
    if given.dtype.kind not in "iu" or (len(given) and not 0 <= given.min() <= given.max() < values.shape[1]):
        raise DataError(f"labels have to be whole numbers in 0..{values.shape[1] - 1}")
    return values, given.astype(np.int64)
