"""What float32 means: every bit of it, whatever the surroundings have switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def true_float32(device: str) -> Iterator[None]:
    """While inside: no TF32 (torch's default for convolutions on a GPU) and no autocast; afterwards all is as it was.

    Args:
        device: type of the device that computes, such as ``"cuda"``.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
