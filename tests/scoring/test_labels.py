"""Label quality and label issues of a pool: cleanlab's numbers, streamed and resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from puma.data.load import load_dataset
from puma.data.pool import Pool, to_tensor
from puma.errors import ModelError, ResumeError, UsageError
from puma.margins import MarginTable
from puma.scoring.labels import score_labels


class Linear(nn.Module):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10, bias=False)
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(self.layer.weight, std=0.5, generator=generator)
        self.calls, self.stop_at = 0, stop_at

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) == 40 and self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += len(images) == 40  # not when it is checked
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits


@pytest.fixture
def pool() -> Pool:
    return Pool([load_dataset("digits?subset=150"), load_dataset("digits:test?subset=130")])


def test_scores_of_a_pool_are_cleanlabs_of_all_probabilities_together(tmp_path: Path, pool: Pool) -> None:
    from cleanlab.experimental.label_issues_batched import find_label_issues_batched
    from cleanlab.rank import get_label_quality_scores

    model = Linear().eval()
    table = score_labels(model, pool, out=tmp_path / "scores", batch_size=40, part_rows=100)
    with torch.no_grad():
        probabilities = model(to_tensor(pool.read(slice(None)))).double().softmax(1).numpy()
    own = probabilities[np.arange(len(pool)), pool.labels]
    others = probabilities.copy()
    others[np.arange(len(pool)), pool.labels] = -1
    np.testing.assert_allclose(table.scores["label_quality"], (own - others.max(1) + 1) / 2, atol=1e-6)
    np.testing.assert_allclose(
        table.scores["label_quality"],
        get_label_quality_scores(pool.labels, probabilities, method="normalized_margin"),
        atol=1e-6,
    )
    expected = find_label_issues_batched(
        pool.labels,
        probabilities,
        quality_score_kwargs={"method": "normalized_margin"},
        verbose=False,
        return_mask=True,
    )
    assert 20 < expected.sum() < 260
    np.testing.assert_array_equal(table.scores["label_issue"], expected)
    np.testing.assert_array_equal(table.predicted, probabilities.argmax(1))
    assert not (tmp_path / "scores" / ".probabilities").exists()
    margins = MarginTable(
        label=pool.labels,
        predicted=pool.labels,
        margin=np.ones(280),
        status=np.zeros(280),
        steps=np.ones(280),
        source=pool.source_number,
        meta={"norm": "Linf", "mode": "refined", "settings": {}, "model": {}, "pool": pool.describe()},
    )
    joined = margins.join(table)
    assert set(joined.scores) == {"label_quality", "label_issue"}
    assert joined.margin[0] == 1


def test_an_interrupted_pass_goes_on(tmp_path: Path, pool: Pool) -> None:
    whole = score_labels(Linear().eval(), pool, out=tmp_path / "whole", batch_size=40, part_rows=120)
    stopped = Linear(stop_at=4).eval()  # in the second of three parts
    with pytest.raises(KeyboardInterrupt):
        score_labels(stopped, pool, out=tmp_path / "parts", batch_size=40, part_rows=120)
    with pytest.raises(ResumeError, match="batch_size: 40 there, 20 now"):
        score_labels(stopped, pool, out=tmp_path / "parts", batch_size=20, part_rows=120)
    again = Linear().eval()
    table = score_labels(again, pool, out=tmp_path / "parts", batch_size=40, part_rows=120)
    assert again.calls == 3 + 1  # the second and the third part, of 120 and of 40 images
    assert table.fingerprint == whole.fingerprint
    score_labels(again, pool, out=tmp_path / "parts", batch_size=40, part_rows=120)
    assert again.calls == 4
    for one, two in zip(*(sorted((tmp_path / name).glob("part-*")) for name in ("whole", "parts")), strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_models_that_give_no_probabilities(tmp_path: Path, pool: Pool) -> None:
    trained = nn.Sequential(nn.BatchNorm2d(1), Linear())
    with pytest.raises(ModelError, match="training mode"):
        score_labels(trained, pool, out=tmp_path / "a")
    few = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    with pytest.raises(ModelError, match="3 classes, the data 10"):
        score_labels(few, pool, out=tmp_path / "b")
    many = nn.Sequential(nn.Flatten(), nn.Linear(64, 11)).eval()
    with pytest.raises(ModelError, match="for 10 classes"):
        score_labels(many, pool, out=tmp_path / "b")
    broken = Linear().eval()
    nn.init.constant_(broken.layer.weight[0], float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        score_labels(broken, pool, out=tmp_path / "c")


def test_without_cleanlab_the_extra_is_named(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab.experimental.label_issues_batched", None)
    with pytest.raises(UsageError, match=r"cleanlab is not installed") as caught:
        score_labels(Linear().eval(), pool, out=tmp_path / "a")
    assert "[labels]" in caught.value.fix
    assert not (tmp_path / "a").exists()
