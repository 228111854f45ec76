"""Share of mislabelled perturbed training images, where the answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.errors import DataError, UsageError
from puma.evaluation import mislabelled_shares
from puma.plan import Plan
from puma.threat import ThreatModel


class FirstPixel(nn.Module):
    """Two logits that compare the first pixel with a threshold: its margin is known."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        lead = (images[:, 0, 0, 0] - self.threshold) * self.scale
        return torch.stack([-lead, lead], 1)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """Ten images, first pixels .1 to 1.0; those above .5 are of class 1."""
    images = np.zeros((10, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.round(255 * np.arange(1, 11) / 10)
    labels = (np.arange(1, 11) > 5).astype(np.int64)
    np.savez(tmp_path / "ten.npz", image=images, label=labels)
    return Pool([load_dataset(tmp_path / "ten.npz")])


def plan_of(pool: Pool, keep: list[bool], eps: list[float]) -> Plan:
    threat = {"norm": "Linf", "eps": 0.25}
    meta = {"strategy": "test", "params": {}, "prune_fraction": 0.0, "threat": threat, "pool": pool.describe()}
    return Plan(np.array(keep), np.array(eps, np.float32), meta)


def test_share_is_that_within_reach(pool: Pool) -> None:
    """Boundary .55: at eps .24 the pixels .4, .5, .6 and .7 can be carried over, at .12 only .5 and .6."""
    model, threat = FirstPixel(0.55), ThreatModel("Linf", 0.24)
    full = plan_of(pool, [True] * 10, [0.24] * 10)
    assert mislabelled_shares(model, FirstPixel(0.55), pool, full, threat, loss="ce").share == 0.4
    half = plan_of(pool, [True] * 10, [0.12] * 10)
    assert mislabelled_shares(model, FirstPixel(0.55), pool, half, threat, loss="ce").share == 0.2
    none = plan_of(pool, [True] * 10, [0.0] * 10)
    assert mislabelled_shares(model, FirstPixel(0.55), pool, none, threat, loss="ce").share == 0.0
    kept = plan_of(pool, [False] * 4 + [True] * 6, [0.0] * 4 + [0.24] * 6)
    assert mislabelled_shares(model, FirstPixel(0.55), pool, kept, threat, loss="ce").share == pytest.approx(3 / 6)


def test_attack_of_trades_carries_over_no_more_than_the_label_attack(pool: Pool) -> None:
    model, threat = FirstPixel(0.55), ThreatModel("Linf", 0.24)
    full = plan_of(pool, [True] * 10, [0.24] * 10)
    shares = [mislabelled_shares(model, model, pool, full, threat, seed=seed).share for seed in range(6)]
    assert 0 < max(shares) <= 0.4


def test_the_reference_model_decides(pool: Pool) -> None:
    plan, threat = plan_of(pool, [True] * 10, [0.24] * 10), ThreatModel("Linf", 0.24)
    assert mislabelled_shares(FirstPixel(0.55), FirstPixel(0.05), pool, plan, threat, loss="ce").share == 0.5


def test_by_attack_leaves_out_what_the_reference_gets_wrong_unperturbed(pool: Pool) -> None:
    """Boundary .55 of the attacked model, .35 of the reference: it gets .4 and .5 wrong without any attack."""
    model, reference, threat = FirstPixel(0.55), FirstPixel(0.35), ThreatModel("Linf", 0.24)
    clean = mislabelled_shares(model, reference, pool, plan_of(pool, [True] * 10, [0.0] * 10), threat, loss="ce")
    assert clean == (0.2, 0.0)
    attacked = mislabelled_shares(model, reference, pool, plan_of(pool, [True] * 10, [0.24] * 10), threat, loss="ce")
    assert attacked == (0.4, 0.2)


def test_sample_is_seeded_and_bounded(pool: Pool) -> None:
    plan, threat = plan_of(pool, [True] * 10, [0.24] * 10), ThreatModel("Linf", 0.24)
    model = FirstPixel(0.55)
    shares = [
        mislabelled_shares(model, model, pool, plan, threat, loss="ce", sample=5, seed=seed).share
        for seed in (0, 0, 4, 5)
    ]
    assert shares[0] == shares[1]
    assert len(set(shares)) == 3
    assert all((share * 5) % 1 == pytest.approx(0) for share in shares)


def test_refusals(pool: Pool) -> None:
    model, threat = FirstPixel(0.55), ThreatModel("Linf", 0.24)
    with pytest.raises(DataError, match="keeps no image"):
        mislabelled_shares(model, model, pool, plan_of(pool, [False] * 10, [0.0] * 10), threat)
    with pytest.raises(UsageError, match="not for L2"):
        mislabelled_shares(model, model, pool, plan_of(pool, [True] * 10, [0.1] * 10), ThreatModel("L2", 0.5))
    with pytest.raises(UsageError, match="sample of 0"):
        mislabelled_shares(model, model, pool, plan_of(pool, [True] * 10, [0.1] * 10), threat, sample=0)
