"""Keyed permutations of ``0..n-1`` in constant memory: any position of any pass, without making the others.

A balanced Feistel network with modular addition on ``a x a`` cells, ``a = ceil(sqrt(n))``, is a bijection whatever its
round function; positions that land beyond ``n`` are sent through it again until they land inside ("cycle walking",
Black and Rogaway 2002), which is a bijection of ``0..n-1``. The round function is the finaliser of SplitMix64. Integer
arithmetic only, so the same key gives the same permutation on every machine and numpy version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def permuted(positions: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Where the permutation called ``key`` of ``0..n-1`` sends ``positions``.

    Args:
        positions: int64, each in ``[0, n)``.
        n: number of elements, at least 1 where there are positions.
        key: any integer; another key is another permutation.

    >>> sorted(permuted(np.arange(5), 5, key=1).tolist())
    [0, 1, 2, 3, 4]
    """
    out = np.asarray(positions, dtype=np.int64).copy()
    side = max(int(np.ceil(np.sqrt(max(n, 1)))), 1)
    while side * side < n:  # the square root of a large n may be rounded down
        side += 1
    keys = _round_keys(key)
    pending = np.arange(out.size)
    flat = out.reshape(-1)
    while pending.size:
        walked = _feistel(flat[pending], side, keys)
        flat[pending] = walked
        pending = pending[walked >= n]
    return out


def drawn(count: int, n: int, key: int) -> NDArray[np.int64]:
    """``count`` independent uniform draws from ``0..n-1`` (with replacement): the SplitMix64 sequence of ``key``."""
    with np.errstate(over="ignore"):
        counter = np.uint64(key & _MASK) + np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mix(counter) % np.uint64(n)).astype(np.int64)


def mixed_key(*parts: int) -> int:
    """One key from several integers (a seed, the number of a pass, a stream)."""
    state = 0
    for part in parts:
        state = _mix_int((state ^ (part & _MASK)) + _GOLDEN)
    return state


def _feistel(values: NDArray[np.int64], side: int, keys: list[np.uint64]) -> NDArray[np.int64]:
    left, right = np.divmod(values.astype(np.uint64), np.uint64(side))
    for key in keys:
        left, right = right, (left + _mix(right ^ key) % np.uint64(side)) % np.uint64(side)
    return (left * np.uint64(side) + right).astype(np.int64)


def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(mixed_key(key, number)) for number in range(_ROUNDS)]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), element by element."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
