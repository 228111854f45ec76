from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puma.data.pool import BatchSampler
from puma.errors import DataError, UsageError
from puma.rng import permuted, sampled


@given(st.integers(1, 5000), st.integers(-(2**70), 2**70))
@settings(max_examples=60, deadline=None)
def test_permuted_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


def test_permuted_reaches_far_rows_without_memory() -> None:
    n = 50_000_000_017
    rows = permuted(np.arange(10_000, dtype=np.int64) * 4_999_999, n, key=5)
    assert len(np.unique(rows)) == 10_000
    assert 0 <= rows.min() < n / 100
    assert n * 0.99 < rows.max() < n


def test_permutations_of_different_keys_are_uniform() -> None:
    n, keys = 20, 2000
    places = np.stack([permuted(np.arange(n), n, key) for key in range(keys)])
    counts = np.stack([np.bincount(places[:, position], minlength=n) for position in range(n)])
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum(1)
    assert chi2.max() < 60  # 19 degrees of freedom: P(chi2 > 60) = 4e-6 for each of 20
    follows = np.bincount((places[:, 1] - places[:, 0]) % n, minlength=n)[1:]
    assert ((follows - keys / 19) ** 2 / (keys / 19)).sum() < 60


def test_draws_are_uniform() -> None:
    counts = np.bincount(sampled(100_000, 100, key=7), minlength=100)
    assert 50 < ((counts - 1000) ** 2 / 1000).sum() < 170


def pool_mask() -> np.ndarray:
    return np.repeat([False, True], [100, 300])


def test_share_and_membership_of_each_batch() -> None:
    synthetic = pool_mask()
    keep = np.arange(400) % 3 != 0
    sampler = BatchSampler(synthetic, keep=keep, batch_size=33, synthetic_share=0.7, seed=1)
    for step in range(20):
        batch = sampler.indices(step)
        assert len(batch) == 33
        assert keep[batch].all()
        assert synthetic[batch].sum() == int(33 * 0.7)


def test_real_rows_come_once_a_pass_across_batches() -> None:
    synthetic = pool_mask()
    sampler = BatchSampler(synthetic, batch_size=32, synthetic_share=0.5, seed=2)
    batches = [sampler.indices(step) for step in range(25)]  # 400 draws: four passes
    real = np.concatenate([batch[~synthetic[batch]] for batch in batches])
    for number in range(4):
        of_pass = set()
        for step in range(25):
            batch = sampler.indices(step)
            of_pass |= set(batch[~synthetic[batch]].tolist())
        assert of_pass == set(range(100)), number
    assert np.bincount(real, minlength=100)[:100].tolist() == [4] * 100


def test_synthetic_rows_come_with_replacement() -> None:
    synthetic = pool_mask()
    sampler = BatchSampler(synthetic, batch_size=60, synthetic_share=0.5, seed=3)
    made = np.concatenate([batch[synthetic[batch]] for batch in map(sampler.indices, range(10))])  # 300 of 300 rows
    assert 150 < len(np.unique(made)) < 240  # 190 are expected


def test_any_batch_is_recomputed_from_seed_and_step() -> None:
    arguments = {"batch_size": 50, "synthetic_share": 0.7, "seed": 9}
    one = BatchSampler(pool_mask(), **arguments)
    for step in range(30):
        one.indices(step)
    np.testing.assert_array_equal(BatchSampler(pool_mask(), **arguments).indices(29), one.indices(29))
    assert not np.array_equal(one.indices(28), one.indices(29))
    other = BatchSampler(pool_mask(), **{**arguments, "seed": 10})
    assert not np.array_equal(one.indices(29), other.indices(29))


@pytest.mark.parametrize("world", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("share", [None, 0.0, 0.7, 1.0])
def test_ranks_partition_the_batch_without_padding(world: int, share: float | None) -> None:
    sampler = BatchSampler(pool_mask(), batch_size=50, synthetic_share=share, seed=4)
    whole = sampler.indices(5)
    parts = [sampler.indices(5, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == sorted(whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_share_is_ignored_where_only_one_kind_is_kept() -> None:
    synthetic = pool_mask()
    for keep in (synthetic, ~synthetic):
        batch = BatchSampler(synthetic, keep=keep, batch_size=40, synthetic_share=0.3).indices(0)
        assert len(batch) == 40
        assert keep[batch].all()


def test_real_rows_without_a_share_are_one_pass_over_everything() -> None:
    sampler = BatchSampler(np.zeros(400, bool), batch_size=40, seed=5)
    rows = np.concatenate([sampler.indices(step) for step in range(10)])
    assert sorted(rows) == list(range(400))


def test_batch_larger_than_what_is_kept() -> None:
    keep = np.zeros(400, dtype=bool)
    keep[[3, 17, 50]] = True
    rows = BatchSampler(pool_mask(), keep=keep, batch_size=10).indices(0)
    assert set(rows) == {3, 17, 50}
    assert np.bincount(rows).max() - np.bincount(rows)[[3, 17, 50]].min() <= 1


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="no row is kept"):
        BatchSampler(pool_mask(), keep=np.zeros(400, bool), batch_size=4)
    with pytest.raises(DataError, match="the plan has 3 rows, the pool 400"):
        BatchSampler(pool_mask(), keep=np.ones(3, bool), batch_size=4)
    with pytest.raises(UsageError, match="keep is int64, not a mask"):
        BatchSampler(pool_mask(), keep=np.arange(400), batch_size=4)
    with pytest.raises(UsageError, match="batch size 0"):
        BatchSampler(pool_mask(), batch_size=0)
    with pytest.raises(UsageError, match=r"share 1\.5"):
        BatchSampler(pool_mask(), batch_size=4, synthetic_share=1.5)
    with pytest.raises(UsageError, match="no batch"):
        BatchSampler(pool_mask(), batch_size=4).indices(0, 0, 5)
