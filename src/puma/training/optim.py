"""The network that is trained and what moves its weights: schedules as functions of the step, SGD, AWP."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from puma.data.pool import Pool
from puma.devices import Devices
from puma.errors import ModelError
from puma.models.checks import as_logits, batchnorm_layers, check_model, kept_statistics, model_errors
from puma.models.networks import build_model
from puma.models.weights import copy_network, ramped_decay, set_class_names, unwrap
from puma.training.recipe import Recipe

# Defaults of torch's OneCycleLR: range of the cycled momentum, div_factor and final_div_factor.
_LOW, _HIGH, _START, _END = 0.85, 0.95, 25.0, 1e4


def trainable_copy(
    model: nn.Module | str, pool: Pool, images: Tensor, recipe: Recipe, seed: int, devices: Devices
) -> nn.Module:
    """A copy of the network on the device, in eval mode, once ``images`` have gone through it both ways.

    `ModelError` where it fails on them, has too few logits, or no parameter to train.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module cannot be trained", fix="train the Python module that it was made from")
    if isinstance(model, str):
        height, _, channels = pool.image_shape
        network = build_model(model, pool.num_classes, in_channels=channels, image_size=height, seed=seed)
    else:
        network = copy_network(unwrap(model))
        _check_kinds(network)
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it for tensors only
    network = network.to(devices.device).eval()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        what = f"{type(network).__name__} has no parameter that takes a gradient"
        raise ModelError(what, fix="model.requires_grad_(True)")
    check_model(network, images, int(pool.labels.max()) + 1, reacts=False)
    _check_backward(network.train(), images[: recipe.micro_batch or recipe.batch_size // devices.world_size], devices)
    set_class_names(network.eval(), pool.class_names)
    return network


def _check_kinds(network: nn.Module) -> None:
    """Refuse parameters, buffers and layers that cannot be trained, averaged or saved, by name."""
    for name, layer in network.named_modules():
        if getattr(layer, "sparse", False) is True:
            raise ModelError(f"{name}.weight gets sparse gradients", fix="build the layer with sparse=False")
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelError(f"{name} is a {type(value).__name__} and no tensor", fix="keep it outside get_extra_state")
        if nn.parameter.is_lazy(value):
            raise ModelError(f"{name} has no shape yet", fix="pass one batch through the network first")
        if value.is_complex():
            raise ModelError(f"{name} is {value.dtype}", fix="keep real and imaginary parts as two real tensors")
        if value.layout is torch.strided and any(
            s == 0 < n - 1 for n, s in zip(value.shape, value.stride(), strict=True)
        ):
            raise ModelError(f"{name} is an expanded tensor, whose values share memory", fix="register its .clone()")


def _check_backward(network: nn.Module, images: Tensor, devices: Devices) -> None:
    """One forward and backward pass in training mode, which leaves weights, buffers and generators as they are."""
    gpus = [devices.device] if devices.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), kept_statistics(network), devices.autocast(), model_errors(images):
        logits = as_logits(network(images), len(images))
        parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(logits.float().square().sum(), list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if unused and devices.world_size > 1:
        what = f"parameters of the network take no part in its logits: {', '.join(unused[:4])}"
        why, fix = "several processes would wait for their gradients", "freeze them: parameter.requires_grad_(False)"
        raise ModelError(what, why=why, fix=fix)


class SeveralPasses(nn.Module):
    """The network on several batches in one call: a wrapper has to see one forward pass for each backward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *batches: Tensor) -> list[Tensor]:
        """Logits of each, float32 ``[B, K]``."""
        return [as_logits(self.network(images), len(images)).float() for images in batches]


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of optimiser step ``step``, counted from 0."""
    highest = recipe.learning_rate
    if recipe.schedule == "constant":
        return highest
    if recipe.schedule == "step":
        return highest * 0.1 ** sum(step >= share * recipe.steps for share in recipe.milestones)
    return _one_cycle(recipe, step, highest / _START, highest, highest / _START / _END)


def momentum(recipe: Recipe, step: int) -> float:
    """The momentum of optimiser step ``step``; cycled against the learning rate if the recipe says so."""
    return _one_cycle(recipe, step, _HIGH, _LOW, _HIGH) if recipe.cycle_momentum else recipe.momentum


def follow_schedules(optimizer: torch.optim.Optimizer, network: nn.Module, recipe: Recipe, step: int) -> None:
    """Set learning rate, momentum, and the weight of the newest batch in running statistics for ``step``."""
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = learning_rate(recipe, step), momentum(recipe, step)
    if recipe.batchnorm_momentum is not None:
        for layer in batchnorm_layers(network):
            layer.momentum = 1.0 if step == 0 and recipe.batchnorm_first_step else recipe.batchnorm_momentum


def ema_decay(recipe: Recipe, step: int) -> float:
    """The decay of the weight average after ``step`` steps, counted from 1; 0 copies the weights."""
    since = step - recipe.ema_warmup * recipe.steps
    if since < 0:
        return 0.0
    return ramped_decay(recipe.ema, since) if recipe.ema_ramp else recipe.ema


def _one_cycle(recipe: Recipe, step: int, start: float, peak: float, end: float) -> float:
    """``torch.optim.lr_scheduler.OneCycleLR`` with cosine annealing, moved every ``schedule_every`` steps."""
    total = math.ceil(recipe.steps / recipe.schedule_every)
    now, turn, last = step // recipe.schedule_every, recipe.warmup * total - 1, total - 1
    share = (now - turn) / (last - turn)
    if now <= turn and turn > 0:
        end, peak, share = peak, start, now / turn
    return end + (peak - end) / 2 * (1 + math.cos(math.pi * share))


def build_sgd(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD without frozen parameters, in two groups where weight decay spares batch normalisation."""
    norms = [] if recipe.decay_norm_parameters else batchnorm_layers(network)
    spared = {id(parameter) for layer in norms for parameter in layer.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (recipe.weight_decay, 0.0)]
    for parameter in network.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in spared]["params"].append(parameter)
    used = [group for group in groups if group["params"]]
    return torch.optim.SGD(used, recipe.learning_rate, recipe.momentum, nesterov=recipe.nesterov, fused=True)


class AWP:
    """Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884), on top of any loss.

    For one forward and backward pass each weight matrix or kernel of the bare ``network`` moves by ``size`` (gamma) of
    its own norm along its gradient, averaged over the processes (algorithm 1 of the paper, one step, as in its code).
    """

    def __init__(self, network: nn.Module, size: float, devices: Devices) -> None:
        self._weights = [weight for weight in network.parameters() if weight.ndim > 1 and weight.requires_grad]
        self._size, self._devices = size, devices
        self._before: list[Tensor] = []

    def add(self, *losses: Callable[[], Tensor]) -> None:
        """Perturb the weights so that the sum of the ``losses`` (one for each micro-batch) rises."""
        gradients: list[Tensor] = []
        for loss in losses:
            new = torch.autograd.grad(loss(), self._weights, allow_unused=True, materialize_grads=True)
            gradients = [one + other for one, other in zip(gradients, new, strict=True)] if gradients else list(new)
        self._before = [weight.detach().clone() for weight in self._weights]
        with torch.no_grad():
            for weight, gradient in zip(self._weights, gradients, strict=True):
                mean = self._devices.all_reduce(gradient)
                weight.add_(mean * (self._size * weight.norm() / (mean.norm() + 1e-20)))

    @torch.no_grad()
    def remove(self) -> None:
        """Put the weights back, the same bits; their gradients stay those of the perturbed weights."""
        for weight, before in zip(self._weights, self._before, strict=False):
            weight.copy_(before)
        self._before = []
