"""The exponential moving average of the weights: the model that is judged."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from puma.distribute import Devices
from puma.models.batchnorm import copy_buffers
from puma.recipe import Recipe
from puma.training.schedule import ema_decay


class Average:
    """An exponential moving average of a network's parameters.

    Args:
        model: the bare network; copied.
        recipe: fields ``ema*``.
        devices: the processes that train together.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, devices: Devices) -> None:
        self.recipe, self._devices = recipe, devices
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._own: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps, counted from 1."""
        share = 1 - ema_decay(self.recipe, step)
        torch._foreach_lerp_(self._own, [parameter.detach() for parameter in model.parameters()], share)
        if self.recipe.ema_batchnorm == "average":
            for own, live in zip(self.model.buffers(), model.buffers(), strict=True):
                own.lerp_(live, share) if own.is_floating_point() else own.copy_(live)

    def sync(self, model: nn.Module) -> nn.Module:
        """The averaged network with the running statistics that the recipe gives it, ready to be judged or saved.

        All processes call it together: statistics are each one's own until here, those of ``model`` and, where the
        recipe averages them, the average's too. Then all have the first one's.
        """
        self._devices.share_buffers(model)
        if self.recipe.ema_batchnorm == "copy":
            copy_buffers(model, self.model)
        else:
            self._devices.share_buffers(self.model)
        return self.model
