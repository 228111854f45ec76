"""Exponential moving average of a network's weights, for classifiers and diffusion models alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from puma.models.modes import copy_network


def ramped_decay(decay: float, step: int | float) -> float:
    """``min(decay, (1 + step) / (10 + step))``: a short memory at first, so that the initial weights are forgotten."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """An averaged copy of a network: ``average <- decay * average + (1 - decay) * live`` at every `update`.

    Args:
        network: the bare network; copied with its buffers, not changed.

    Attributes:
        model: the averaged network, in eval mode, without gradients.

    >>> live = nn.Linear(1, 1)
    >>> ema, start = EMA(live), live.weight.item()
    >>> with torch.no_grad():
    ...     _ = live.weight.add_(1.0)
    >>> ema.update(live, decay=0.75)
    >>> round(ema.model.weight.item() - start, 4)
    0.25
    """

    def __init__(self, network: nn.Module) -> None:
        self.model = copy_network(network).eval().requires_grad_(False)
        self._parameters: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float, *, buffers: bool = False) -> None:
        """Average in the weights of ``network``.

        Args:
            network: the live network.
            decay: in [0, 1]; 0 copies the live weights.
            buffers: average floating-point buffers (running statistics) too, and copy the others.
        """
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(self._parameters, [parameter.detach() for parameter in network.parameters()], None)
        if buffers:
            for own, live in zip(self.model.buffers(), network.buffers(), strict=True):
                own.lerp_(live, 1 - decay) if own.is_floating_point() else own.copy_(live)

    @torch.no_grad()
    def copy_buffers(self, network: nn.Module) -> None:
        """Take over the buffers (running statistics) of the live network."""
        for own, live in zip(self.model.buffers(), network.buffers(), strict=True):
            own.copy_(live)
