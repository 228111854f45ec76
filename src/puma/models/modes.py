"""States of a network: under attack, with running statistics held still, in true float32, copied, averaged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from puma.errors import ModelError

_Network = TypeVar("_Network", bound=nn.Module)


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The batch-normalisation layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def require_module(model: object) -> None:
    """Refuse (`ModelError`) a function, a name or a file in a network's place."""
    if not isinstance(model, nn.Module):
        what, why = f"the model is a {type(model).__name__}", "parameters and buffers are needed: a torch.nn.Module"
        raise ModelError(what, why=why, fix="a file: puma.load_model(path); a function: call it in a Module's forward")


@contextmanager
def attack_mode(model: nn.Module, batchnorm: str = "unchanged") -> Iterator[None]:
    """Context in which no parameter takes a gradient and no buffer changes; everything is restored afterwards.

    ``batchnorm="unchanged"`` leaves the mode (train or eval) as it is; ``"train"`` normalises by the statistics of the
    batch under attack (Wang et al. 2023; Gowal et al. 2020); ``"eval"`` puts the network in eval mode (TRADES, MART).
    """
    require_module(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    switched: list[nn.Module] = []
    if batchnorm == "eval":
        switched = [module for module in model.modules() if module.training]
    elif batchnorm == "train":
        switched = [layer for layer in batchnorm_layers(model) if layer.track_running_stats and not layer.training]
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in switched:
        module.training = not module.training
    try:
        with kept_statistics(model):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in switched:
            module.training = not module.training


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which no buffer of ``model`` changes.

    Batch normalisation in training mode normalises by the batch and leaves its running statistics alone; what other
    layers write into their buffers is put back afterwards.
    """
    layers = [layer for layer in batchnorm_layers(model) if layer.track_running_stats and layer.training]
    others = [module for module in model.modules() if not isinstance(module, _BatchNorm)]
    buffers = [(module, *named) for module in others for named in module.named_buffers(recurse=False)]
    saved = [(*one, one[2].clone(), one[2]._version) for one in buffers if not one[2].is_inference()]
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
    return next(model.parameters(), next(model.buffers(), torch.empty(0, device="cpu"))).device


def copy_network(model: _Network) -> _Network:
    """A deep copy, also of networks that keep computed weights (``torch.nn.utils.weight_norm``)."""
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


@contextmanager
def true_float32(device: str) -> Iterator[None]:
    """Context that disables TF32 (torch's default for convolutions on a GPU) and autocast on a device of this type."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def ramped_decay(decay: float, step: int | float) -> float:
    """``min(decay, (1 + step) / (10 + step))``: a short memory at first, so that the initial weights are forgotten."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """An averaged copy of a bare network: ``average <- decay * average + (1 - decay) * live`` at every `update`.

    Its ``model`` is in eval mode and without gradients; the buffers begin as copies too.
    """

    def __init__(self, network: nn.Module) -> None:
        self.model = copy_network(network).eval().requires_grad_(False)
        self._parameters: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Average in the weights of the live ``network``; ``decay`` in [0, 1], 0 copies them."""
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # of torch
        average(self._parameters, [parameter.detach() for parameter in network.parameters()], None)

    @torch.no_grad()
    def copy_buffers(self, network: nn.Module) -> None:
        """Take over the buffers (running statistics) of the live network."""
        for own, live in zip(self.model.buffers(), network.buffers(), strict=True):
            own.copy_(live)
