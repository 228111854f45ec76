"""Batch normalisation under attack and under averaging: which statistics are used, and which are changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """All batch-normalisation layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def attack_mode(model: nn.Module, batchnorm: str = "unchanged") -> Iterator[None]:
    """While inside, no parameter takes a gradient and no running statistic changes; everything is restored.

    Args:
        model: the network under attack.
        batchnorm: ``"unchanged"`` leaves the mode (train or eval) as it is; ``"train"`` normalises by the statistics of
            the batch under attack (Wang et al. 2023; Gowal et al. 2020); ``"eval"`` puts the whole network in eval mode
            (TRADES 2019, MART).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = [layer for layer in batchnorm_layers(model) if layer.track_running_stats]
    training = [module for module in model.modules() if module.training] if batchnorm == "eval" else []
    modes = [layer.training for layer in layers]
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in training:
        module.training = False
    for layer in layers:
        if batchnorm == "train":
            layer.training = True
        # in training mode this uses the batch and leaves the running statistics alone; eval mode needs it as it was
        layer.track_running_stats = not layer.training
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for layer, mode in zip(layers, modes, strict=True):
            layer.track_running_stats, layer.training = True, mode
        for module in training:
            module.training = True


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """While inside, layers in training mode normalise by the batch and change no running statistic."""
    layers = [layer for layer in batchnorm_layers(model) if layer.track_running_stats and layer.training]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Give every batch-normalisation layer the weight ``momentum`` of the newest batch in its running statistics."""
    for layer in batchnorm_layers(model):
        layer.momentum = momentum
