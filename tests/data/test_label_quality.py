from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.tensors import to_tensor
from puma.errors import DataError, ModelError, ResumeError
from puma.label_quality import Ranked, agreement, class_thresholds, confident_joint, confident_learning
from puma.label_scores import score_labels
from puma.margins import MarginTable


def by_the_paper(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Confident learning written row by row, as equation (1) of arXiv 1911.00068 reads."""
    classes = probabilities.shape[1]
    thresholds = [probabilities[labels == j, j].mean() if (labels == j).any() else np.inf for j in range(classes)]
    flags = []
    for row, label in zip(probabilities, labels, strict=True):
        reached = [j for j in range(classes) if row[j] >= thresholds[j]]
        flags.append(bool(reached) and max(reached, key=lambda j: (row[j], -j)) != label)
    return np.array(flags)


@given(st.integers(1, 60), st.integers(2, 12), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_flags_equal_the_definition(rows: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.5), rows)
    labels = rng.integers(0, classes, rows)
    # float32 is what is kept: compare in it, so that ties fall alike
    kept = probabilities.astype(np.float32).astype(np.float64)
    own = kept[np.arange(rows), labels]
    thresholds = class_thresholds(own, labels, classes)
    counted = Ranked.of(kept, classes).counted_to(thresholds)
    expected = by_the_paper(kept, labels)
    np.testing.assert_array_equal((counted >= 0) & (counted != labels), expected)
    short = Ranked.of(kept, 3)
    if short.exact(thresholds, classes):
        np.testing.assert_array_equal(short.counted_to(thresholds), counted)


def test_agreement_is_positive_exactly_where_the_model_agrees() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), 500)
    labels = rng.integers(0, 5, 500)
    score = agreement(probabilities, labels)
    np.testing.assert_array_equal(score > 0, probabilities.argmax(1) == labels)
    assert np.abs(score).max() <= 1


def test_injected_wrong_labels_are_found_and_their_share_estimated() -> None:
    rng = np.random.default_rng(1)
    true = rng.integers(0, 4, 4000)
    labels = true.copy()
    wrong = rng.random(4000) < 0.1
    labels[wrong] = (true[wrong] + 1) % 4
    probabilities = rng.dirichlet(np.ones(4), 4000) * 0.3
    probabilities[np.arange(4000), true] += 0.7
    flags = confident_learning(probabilities, labels)
    assert flags[wrong].mean() > 0.9
    assert flags[~wrong].mean() < 0.02
    thresholds = class_thresholds(probabilities[np.arange(4000), labels], labels, 4)
    joint = confident_joint(Ranked.of(probabilities).counted_to(thresholds), labels, 4)
    assert joint.sum() == pytest.approx(1)
    assert 1 - np.trace(joint) == pytest.approx(0.1, abs=0.02)
    np.testing.assert_allclose(joint.sum(1), np.bincount(labels) / 4000)


def test_what_is_not_probabilities_is_refused() -> None:
    with pytest.raises(DataError, match="not probabilities"):
        agreement([[2.0, 3.0]], [0])
    with pytest.raises(DataError, match=r"in 0\.\.1"):
        confident_learning([[0.5, 0.5]], [2])
    with pytest.raises(DataError, match="for labels"):
        confident_learning([[0.5, 0.5]], [0, 1])


class Linear(nn.Module):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10, bias=False)
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(self.layer.weight, std=0.5, generator=generator)
        self.calls, self.stop_at = 0, stop_at

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits


@pytest.fixture
def pool() -> Pool:
    return Pool([load_dataset("digits?subset=150"), load_dataset("digits:test?subset=130")])


def test_scores_of_a_pool_equal_those_of_its_probabilities(tmp_path: Path, pool: Pool) -> None:
    model = Linear().eval()
    table = score_labels(model, pool, out=tmp_path / "scores", batch_size=32, part_rows=100)
    with torch.no_grad():
        probabilities = model(to_tensor(pool.read(slice(None)))).double().softmax(1).numpy()
    np.testing.assert_allclose(table.scores["agreement"], agreement(probabilities, pool.labels), atol=1e-5)
    expected = confident_learning(probabilities, pool.labels)
    assert expected.sum() > 20
    np.testing.assert_array_equal(table.scores["confident-learning"] == 1, expected)
    np.testing.assert_array_equal(table.predicted, probabilities.argmax(1))
    assert not (tmp_path / "scores" / ".predictions").exists()
    margins = MarginTable(
        label=pool.labels,
        predicted=pool.labels,
        margin=np.ones(280),
        status=np.zeros(280),
        steps=np.ones(280),
        source=pool.source.codes,
        meta={"norm": "Linf", "mode": "refined", "settings": {}, "model": {}, "pool": pool.describe()},
    )
    joined = margins.join(table)
    assert set(joined.scores) == {"agreement", "confident-learning"}
    assert joined.margin[0] == 1


def test_an_interrupted_pass_goes_on(tmp_path: Path, pool: Pool) -> None:
    whole = score_labels(Linear().eval(), pool, out=tmp_path / "whole", batch_size=50, part_rows=100)

    stopped = Linear(stop_at=4).eval()
    with pytest.raises(KeyboardInterrupt):
        score_labels(stopped, pool, out=tmp_path / "parts", batch_size=50, part_rows=100)
    with pytest.raises(ResumeError, match="other settings"):
        score_labels(stopped, pool, out=tmp_path / "parts", batch_size=20, part_rows=100)
    again = Linear().eval()
    table = score_labels(again, pool, out=tmp_path / "parts", batch_size=50, part_rows=100)
    assert again.calls == 2  # the last of three parts: 80 images in two batches
    assert table.fingerprint == whole.fingerprint
    score_labels(again, pool, out=tmp_path / "parts", batch_size=50, part_rows=100)
    assert again.calls == 2


def test_models_that_cannot_be_asked(tmp_path: Path, pool: Pool) -> None:
    with pytest.raises(ModelError, match="training mode"):
        score_labels(Linear(), pool, out=tmp_path / "a")
    few = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    with pytest.raises(ModelError, match="for 10 classes"):
        score_labels(few, pool, out=tmp_path / "b")
    broken = Linear().eval()
    nn.init.constant_(broken.layer.weight, float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        score_labels(broken, pool, out=tmp_path / "c")
