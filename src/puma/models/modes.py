"""Modes of a network: under attack, with running statistics held still, in true float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_Network = TypeVar("_Network", bound=nn.Module)


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """All batch-normalisation layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def attack_mode(model: nn.Module, batchnorm: str = "unchanged") -> Iterator[None]:
    """Context in which no parameter takes a gradient and no buffer changes; everything is restored afterwards.

    Args:
        model: the network under attack.
        batchnorm: ``"unchanged"`` leaves the mode (train or eval) as it is; ``"train"`` normalises by the statistics of
            the batch under attack (Wang et al. 2023; Gowal et al. 2020); ``"eval"`` puts the whole network in eval mode
            (TRADES 2019, MART).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training] if batchnorm == "eval" else []
    modes = [(layer, layer.training) for layer in batchnorm_layers(model) if layer.track_running_stats]
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in training:
        module.training = False
    for layer, _ in modes:
        layer.training = layer.training or batchnorm == "train"
    try:
        with kept_statistics(model):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for layer, mode in modes:
            layer.training = mode
        for module in training:
            module.training = True


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which no buffer of ``model`` changes.

    Batch normalisation in training mode normalises by the batch and leaves its running statistics alone; what other
    layers write into their buffers is put back afterwards.
    """
    layers = [layer for layer in batchnorm_layers(model) if layer.track_running_stats and layer.training]
    saved = [
        (module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        if not isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
        if not buffer.is_inference()
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        for module, name, buffer, value, version in saved:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU where there is none."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def set_momentum(model: nn.Module, momentum: float) -> None:
    """Give every batch-normalisation layer the weight ``momentum`` of the newest batch in its running statistics."""
    for layer in batchnorm_layers(model):
        layer.momentum = momentum


def copy_network(model: _Network) -> _Network:
    """A deep copy, also of networks that keep computed weights (``torch.nn.utils.weight_norm``)."""
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


@contextmanager
def true_float32(device: str) -> Iterator[None]:
    """Context that disables TF32 (torch's default for convolutions on a GPU) and autocast.

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
