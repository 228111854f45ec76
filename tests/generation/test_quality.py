"""Quality measures against slow references, closed forms, and generators whose fault is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from puma.data.load import load_dataset
from puma.data.source import Source, in_memory
from puma.errors import DataError
from puma.generation.quality import coverage, measure, nearest

POINTS = hnp.arrays(np.float64, st.tuples(st.integers(2, 30), st.just(3)), elements=st.floats(-5, 5))


@given(points=POINTS, others=POINTS)
def test_nearest_equals_the_full_matrix(points: NDArray[np.float64], others: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(nearest(points, others), cdist(points, others).min(1), atol=1e-6)


def test_coverage_equals_its_definition() -> None:
    random = np.random.default_rng(0)
    real, fake = random.normal(size=(40, 2)), random.normal(size=(40, 2)) + 1
    among, between = cdist(real, real), cdist(real, fake)
    wanted = np.mean([between[i].min() < np.sort(among[i])[5] for i in range(40)])
    assert 0 < wanted < 1
    assert coverage(real, fake) == wanted


def _source(images: NDArray[np.uint8], labels: NDArray[np.int64], name: str = "made") -> Source:
    return Source(in_memory(images), labels, name=name, fingerprint=name, class_names=list("0123456789"))


@pytest.fixture(scope="module")
def train() -> Source:
    return load_dataset("digits:train")


@pytest.fixture(scope="module")
def test() -> Source:
    return load_dataset("digits:test")


def test_a_copying_generator_is_found_out(train: Source, test: Source) -> None:
    found = measure(train, test, train)
    assert found["label_agreement"] > 0.99
    assert found["neighbor"]["synthetic_to_train"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["neighbor"]["copies"] == 1.0
    json.dumps(found, allow_nan=False)


def test_a_perfect_generator_scores_as_test_images_do(train: Source, test: Source) -> None:
    found = measure(train, test, test)
    assert found["label_agreement"] == found["real_accuracy"]
    assert found["neighbor"]["synthetic_to_train"] == found["neighbor"]["test_to_train"]
    assert found["coverage"]["synthetic"] == found["coverage"]["test"]


def test_wrong_labels_show(train: Source, test: Source) -> None:
    labels = test.labels.copy()
    wrong = np.arange(len(labels)) % 4 == 0
    labels[wrong] = (labels[wrong] + 1) % 10
    found = measure(train, test, _source(test.read(slice(None)), labels))
    assert found["label_agreement"] == pytest.approx(0.75, abs=0.03)


def test_one_image_per_class_shows_in_coverage(train: Source, test: Source) -> None:
    first = np.array([np.flatnonzero(train.labels == label)[0] for label in range(10)])
    found = measure(train, test, _source(train.read(np.tile(first, 80)), np.tile(np.arange(10), 80)))
    assert max(found["coverage"]["synthetic"].values()) < 0.5 < min(found["coverage"]["test"].values())


def test_class_sorted_files_are_no_trap(train: Source, test: Source) -> None:
    rows = np.repeat(
        np.argsort(test.labels, kind="stable"), 2
    )  # twice as many as are compared: a prefix is five classes
    found = measure(train, test, _source(test.read(rows), test.labels[rows]))
    assert min(found["coverage"]["synthetic"].values()) > 0.7


def test_large_images_are_projected(train: Source, test: Source) -> None:
    def grown(one: Source) -> Source:
        return _source(one.read(slice(0, 300)).repeat(4, 1).repeat(4, 2), one.labels[:300], one.name)

    found = measure(grown(train), grown(test), grown(test), limit=200)
    assert found["features"] == "64 principal components of the training images' 1024 pixels"
    assert found["sources"]["train"] == {"name": "digits", "fingerprint": "digits", "rows": 300, "used": 200}
    assert found["real_accuracy"] > 0.8


def test_other_shapes_are_refused(train: Source, test: Source) -> None:
    images = np.zeros((30, 16, 16, 1), np.uint8)
    with pytest.raises(DataError, match="cannot be compared"):
        measure(train, test, _source(images, np.arange(30) % 10))
    with pytest.raises(DataError, match="too few"):
        measure(train, test, _source(test.read(slice(0, 10)), test.labels[:10]))
