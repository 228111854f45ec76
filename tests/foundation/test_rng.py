"""Seeds of single items: pinned, because every stored result depends on them."""

from __future__ import annotations

import numpy as np

from puma.rng import (
    Stream,
    batch_seed,
    counter_generator,
    image_noise,
    mixed_key,
    permuted,
    sampled,
    torch_seed,
)


def test_the_numbers_are_those_of_stored_results() -> None:
    assert permuted(np.arange(8), 8, key=3).tolist() == [7, 2, 0, 4, 6, 1, 5, 3]
    assert sampled(5, 100, key=7).tolist() == [87, 4, 46, 3, 74]
    assert mixed_key(1, 2, 3) == 15020427595393229491
    assert batch_seed(2, 512) == 805281483
    assert torch_seed(1, Stream.STEP, 4, 1) == 1211848547413792664
    assert counter_generator(1, Stream.LABEL, 9).integers(10**6) == 523019


def test_noise_of_an_image_depends_on_nothing_but_seed_step_and_number() -> None:
    together = image_noise(1, np.array([4, 9]), 2, (3, 2, 2))
    assert np.array_equal(together[1:], image_noise(1, np.array([9]), 2, (3, 2, 2)))
    assert not np.array_equal(together[1:], image_noise(1, np.array([9]), 3, (3, 2, 2)))
    assert together.dtype == np.float32
