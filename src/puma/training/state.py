"""What a checkpoint holds: network, average, momentum, and which images were seen. All else follows from the step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.errors import ModelError
from puma.models.weights import load_weights


class Seen:
    """Which rows of a pool have been drawn: distinct images, as against draws."""

    def __init__(self, size: int) -> None:
        self._flags = np.zeros(size, dtype=np.bool_)
        self.unique = 0

    def add(self, rows: NDArray[np.int64]) -> None:
        """Take in a batch."""
        fresh = np.unique(rows[~self._flags[rows]])
        self._flags[fresh] = True
        self.unique += len(fresh)

    def pack(self) -> Tensor:
        """One bit a row."""
        return torch.from_numpy(np.packbits(self._flags))

    def unpack(self, bits: Tensor) -> None:
        """Restore what `pack` gave."""
        self._flags = np.unpackbits(bits.numpy(), count=len(self._flags)).astype(np.bool_)
        self.unique = int(np.count_nonzero(self._flags))


def pack(network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, seen: Seen) -> dict[str, Tensor]:
    """The state as named tensors."""
    tensors = {f"model.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in average.state_dict().items()}
    for name, parameter in network.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    return {**tensors, "seen": seen.pack()}


def unpack(
    tensors: dict[str, Tensor], network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, seen: Seen
) -> None:
    """Put a state back.

    Raises:
        ModelError: it belongs to another network.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "momentum": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind in parts:
            parts[kind][rest] = value
    if "seen" not in tensors:
        raise ModelError("the checkpoint is not of this version of PUMA")
    load_weights(network, parts["model"], "the checkpoint's network")
    load_weights(average, parts["ema"], "the checkpoint's average")
    for name, parameter in network.named_parameters():
        if name in parts["momentum"]:
            # a fresh tensor in the parameter's own memory format: other strides would change the order of sums
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(parts["momentum"][name])
    seen.unpack(tensors["seen"])
