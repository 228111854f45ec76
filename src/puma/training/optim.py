"""Learning rate, momentum and averaging decay as functions of the step; SGD; adversarial weight perturbation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from puma.devices import Devices
from puma.models.modes import ramped_decay
from puma.training.recipe import Recipe

# Defaults of torch's OneCycleLR: range of the cycled momentum, div_factor and final_div_factor.
_LOW, _HIGH = 0.85, 0.95
_START, _END = 25.0, 1e4
_TINY = 1e-20  # of the authors' AWP code


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of optimiser step ``step``, counted from 0."""
    highest = recipe.scaled_learning_rate
    if recipe.schedule == "constant":
        return highest
    if recipe.schedule == "step":
        return highest * 0.1 ** sum(step >= share * recipe.steps for share in recipe.milestones)
    return _one_cycle(recipe, step, highest / _START, highest, highest / _START / _END)


def momentum(recipe: Recipe, step: int) -> float:
    """The momentum of optimiser step ``step``; cycled against the learning rate if the recipe says so."""
    return _one_cycle(recipe, step, _HIGH, _LOW, _HIGH) if recipe.cycle_momentum else recipe.momentum


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
    """SGD with the recipe's weight decay, in two groups where batch normalisation is spared.

    Parameters that take no gradient (frozen layers) are left out.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    spared = []
    if not recipe.decay_norm_parameters:
        spared = [p for m in network.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    chosen = {id(parameter) for parameter in spared}
    groups = [
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if id(p) in chosen], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.scaled_learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )


class AWP:
    """Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884), on top of any loss.

    For one forward and backward pass each weight matrix or kernel moves by ``size`` of its own norm along its gradient;
    biases and normalisation parameters stay (algorithm 1 of the paper, one step, as in its code). ``size`` is the
    paper's gamma, for example 0.005; ``network`` the bare network; gradients are averaged over the processes.
    """

    def __init__(self, network: nn.Module, size: float, devices: Devices) -> None:
        self._weights = [weight for weight in network.parameters() if weight.ndim > 1 and weight.requires_grad]
        self._size, self._devices = size, devices
        self._before: list[Tensor] = []

    def add(self, *losses: Callable[[], Tensor]) -> None:
        """Perturb the weights so that the sum of the ``losses`` (one for each micro-batch) rises."""
        gradients = [torch.zeros_like(weight) for weight in self._weights]
        for number, loss in enumerate(losses):
            found = torch.autograd.grad(loss(), self._weights, allow_unused=True)
            for place, gradient in enumerate(found):
                if gradient is not None:
                    gradients[place] = gradients[place] + gradient if number else gradient
        self._before = [weight.detach().clone() for weight in self._weights]
        with torch.no_grad():
            for weight, gradient in zip(self._weights, gradients, strict=True):
                mean = self._devices.all_reduce(gradient)
                weight.add_(mean * (self._size * weight.norm() / (mean.norm() + _TINY)))

    @torch.no_grad()
    def remove(self) -> None:
        """Put the weights back, the same bits; their gradients stay those of the perturbed weights."""
        for weight, before in zip(self._weights, self._before, strict=False):
            weight.copy_(before)
        self._before = []
