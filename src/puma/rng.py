"""Seeds of single items: row 7 of pass 3, image 12 of a generated set, batch 5 of an attack.

Every random number is a function of a seed and of what it is for, never of what was computed before, so a result does
not depend on interruptions, batch size, number of workers or order; and it is the same on every machine.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def permuted(positions: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Where the permutation called ``key`` (any integer) of ``0..n-1`` sends ``positions`` (int64), in constant memory.

    A balanced Feistel network on ``a x a`` cells, ``a = ceil(sqrt(n))``; positions that land beyond ``n`` go through it
    again until they land inside ("cycle walking", Black and Rogaway 2002).
    """
    out = np.array(positions, dtype=np.int64, order="C")
    side = math.isqrt(max(n, 1) - 1) + 1
    keys = [np.uint64(mixed_key(key, number)) for number in range(_ROUNDS)]
    pending = np.arange(out.size)
    flat = out.reshape(-1)
    while pending.size:
        left, right = np.divmod(flat[pending].astype(np.uint64), np.uint64(side))
        for one in keys:
            left, right = right, (left + _mix(right ^ one) % np.uint64(side)) % np.uint64(side)
        walked = (left * np.uint64(side) + right).astype(np.int64)
        flat[pending] = walked
        pending = pending[walked >= n]
    return out


def sampled(count: int, n: int, key: int) -> NDArray[np.int64]:
    """``count`` independent uniform draws from ``0..n-1``, with replacement: the SplitMix64 sequence of ``key``."""
    counter = np.uint64(key & _MASK) + np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mix(counter) % np.uint64(n)).astype(np.int64)


def mixed_key(*parts: int) -> int:
    """One 64-bit key from several integers (a seed, the number of a pass, a stream)."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state ^ np.uint64(part & _MASK))
    return int(state[0])


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), element by element."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def batch_seed(seed: int, first: int) -> int:
    """32-bit seed of the batch that begins with image ``first``; torch's CPU generator takes in no more bits."""
    return int(np.random.SeedSequence([seed, first]).generate_state(1)[0])


class Stream(IntEnum):
    """What a draw of generated images is for; different streams of one seed never overlap."""

    INIT = 0
    STEP = 1
    LATENT = 2
    LABEL = 3


def counter_generator(seed: int, stream: Stream, *counter: int) -> np.random.Generator:
    """NumPy generator (Philox; Salmon et al. 2011) at a place named by up to two counters."""
    low, high = (*counter, 0, 0)[:2]
    key = np.array([seed & _MASK, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, low, high], dtype=np.uint64)))


def torch_seed(seed: int, stream: Stream, *counter: int) -> int:
    """63-bit seed for a torch generator at that place."""
    return int(counter_generator(seed, stream, *counter).integers(2**63))


def image_noise(seed: int, indices: NDArray[np.int64], step: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Standard normal noise of generated images ``indices`` at sampler step ``step`` (0: the latent); [B, C, H, W]."""
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices.tolist()):
        counter_generator(seed, Stream.LATENT, step, index).standard_normal(dtype=np.float32, out=noise[row])
    return noise
