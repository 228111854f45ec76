"""Counter-based randomness: any draw can be made again from (seed, what, which), in any order, by any process.

Training has nothing random to save but its step number, and image k of a generated set is the same whatever the
batch size, the part it falls into, or where an earlier run was interrupted.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 2**64 - 1


class Stream(IntEnum):
    """What a draw is for; different streams of one seed never overlap."""

    INIT = 0
    STEP = 1
    LATENT = 2
    LABEL = 3
    SUBSET = 4


def counter_generator(seed: int, stream: Stream, *counter: int) -> np.random.Generator:
    """NumPy generator at a place named by up to two counters (Philox; Salmon et al. 2011).

    >>> first = counter_generator(0, Stream.LATENT, 7, 3).standard_normal()
    >>> first == counter_generator(0, Stream.LATENT, 7, 3).standard_normal()
    True
    >>> first == counter_generator(0, Stream.LATENT, 7, 4).standard_normal()
    False
    """
    low, high = (*counter, 0, 0)[:2]
    key = np.array([seed & _MASK, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, low, high], dtype=np.uint64)))


def torch_seed(seed: int, stream: Stream, *counter: int) -> int:
    """A 63-bit seed for a torch generator at that place."""
    return int(counter_generator(seed, stream, *counter).integers(2**63))


def image_noise(seed: int, indices: NDArray[np.int64], step: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise of generated images ``indices`` at sampler step ``step``; float32 [B, C, H, W].

    Step 0 is the latent, step s + 1 the churn of sampler step s. Each image has its own stream.
    """
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices.tolist()):
        counter_generator(seed, Stream.LATENT, step, index).standard_normal(dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise)
