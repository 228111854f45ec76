from __future__ import annotations

import numpy as np
import pytest

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.margins import MarginTable, Status
from puma.study.stages import average, split_folds


def table(margin: list[float], status: list[Status] | None = None, model: str = "a") -> MarginTable:
    count = len(margin)
    sources = [{"name": "r", "role": "real", "rows": 2}, {"name": "s", "role": "synthetic", "rows": count - 2}]
    meta = {
        "norm": "Linf",
        "model": {"sha256": model},
        "pool": {"fingerprint": "f", "num_classes": 2, "sources": sources},
    }
    found = [Status.MISCLASSIFIED if value < 0 else Status.CROSSED for value in margin]
    return MarginTable(
        label=np.zeros(count),
        predicted=np.array([int(value < 0) for value in margin]),
        margin=np.array(margin),
        status=np.array(status or found),
        steps=np.ones(count),
        source=np.array([0, 0] + [1] * (count - 2)),
        meta=meta,
    )


def test_real_rows_come_from_the_model_that_did_not_see_them_and_synthetic_ones_are_averaged() -> None:
    one = table([0.1, 0.2, 0.3, -0.1, 0.2, 0.4], model="a")
    two = table([0.5, 0.6, 0.1, -0.3, -0.4, float("nan")], model="b")
    scores = np.array([[True, False, True, True, True, True], [False, True, True, True, True, True]])
    combined = average([one, two], scores, "cross_fitted")
    assert combined.margin == pytest.approx([0.1, 0.6, 0.2, -0.2, -0.1, 0.4])
    crossed, wrong = Status.CROSSED, Status.MISCLASSIFIED
    assert combined.status.tolist() == [crossed, crossed, crossed, wrong, wrong, crossed]
    assert combined.meta["model"] == {"cross_fitted": [{"sha256": "a"}, {"sha256": "b"}]}


def test_models_of_one_fold_are_averaged_for_real_rows_too() -> None:
    tables = [table([0.1, 0.2, 0.3], model="a"), table([0.5, 0.9, 0.1], model="b"), table([0.3, -0.5, 0.2], model="c")]
    scores = np.array([[True, False, True], [False, True, True], [True, True, True]])
    combined = average(tables, scores, "cross_fitted")
    assert combined.margin == pytest.approx([0.2, 0.2, 0.2])
    ensemble = average(tables[:2], np.ones((2, 3), bool), "ensemble")
    assert ensemble.margin == pytest.approx([0.3, 0.55, 0.2])
    assert ensemble.meta["model"] == {"ensemble": [{"sha256": "a"}, {"sha256": "b"}]}


def test_folds_are_stratified_and_leave_synthetic_images_to_all() -> None:
    pool = Pool([load_dataset("digits"), load_dataset("digits:test")])
    fold = split_folds(pool, 3)
    assert (fold[pool.synthetic] == -1).all()
    for label in range(10):
        counts = np.bincount(fold[~pool.synthetic & (pool.labels == label)], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert (split_folds(pool, 1)[~pool.synthetic] == 0).all()
