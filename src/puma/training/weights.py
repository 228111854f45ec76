"""Adversarial weight perturbation (AWP, Wu et al. 2020, arXiv 2004.05884), on top of any objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from puma.distribute import Devices

_TINY = 1e-20  # the authors' constant


class WeightPerturbation:
    """Moves the weights to where the loss is higher, for the time of one forward and backward pass.

    Each weight matrix or kernel moves by ``size`` of its own norm along its gradient; biases and normalisation
    parameters stay (algorithm 1 of the paper, one step, as in its code).

    Args:
        network: the bare network.
        size: gamma of the paper, for example 0.005.
        devices: gradients are averaged over the processes.
    """

    def __init__(self, network: nn.Module, size: float, devices: Devices) -> None:
        self._weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        self._size, self._devices = size, devices
        self._before: list[Tensor] = []

    def add(self, loss: Callable[[], Tensor]) -> None:
        """Perturb the weights so that ``loss()`` rises."""
        gradients = torch.autograd.grad(loss(), self._weights)
        self._before = [weight.detach().clone() for weight in self._weights]
        with torch.no_grad():
            for weight, gradient in zip(self._weights, gradients, strict=True):
                mean = self._devices.total(gradient)
                weight.add_(mean * (self._size * weight.norm() / (mean.norm() + _TINY)))

    @torch.no_grad()
    def remove(self) -> None:
        """Put the weights back, the same bits; their gradients stay those of the perturbed place."""
        for weight, before in zip(self._weights, self._before, strict=False):
            weight.copy_(before)
        self._before = []
