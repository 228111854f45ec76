"""The exponential moving average of the weights as a recipe asks for it."""

from __future__ import annotations

from torch import nn

from puma.distribute import Devices
from puma.models.ema import EMA
from puma.training.recipe import Recipe
from puma.training.schedule import ema_decay


class Average:
    """An exponential moving average of a network's parameters.

    Args:
        model: the bare network; copied.
        recipe: fields ``ema*``.
        devices: the processes that train together.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, devices: Devices) -> None:
        self.recipe, self._devices, self._ema = recipe, devices, EMA(model)
        self.model = self._ema.model

    def update(self, model: nn.Module, step: int) -> None:
        """Average in the weights after ``step`` steps, counted from 1."""
        self._ema.update(model, ema_decay(self.recipe, step), buffers=self.recipe.ema_batchnorm == "average")

    def sync(self, model: nn.Module) -> nn.Module:
        """The averaged network with the running statistics that the recipe gives it, ready to be evaluated or saved.

        All processes call it together: statistics are each one's own until here, those of ``model`` and, where the
        recipe averages them, the average's too. Then all have the first one's.
        """
        self._devices.share_buffers(model)
        if self.recipe.ema_batchnorm == "copy":
            self._ema.copy_buffers(model)
        else:
            self._devices.share_buffers(self.model)
        return self.model
