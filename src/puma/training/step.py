"""One adversarial training step, up to the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puma import objectives
from puma.attacks.pgd import ascend
from puma.distribute import Devices
from puma.models.batchnorm import attack_mode
from puma.recipe import Recipe
from puma.threat import ThreatModel


class Both(nn.Module):
    """The network on the clean and on the perturbed images, as two passes in one call.

    Two passes, because each is normalised by its own batch; one call, because a wrapper for several processes has to
    see one forward pass for each backward pass. ``clean`` may be None.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clean: Tensor | None, adversarial: Tensor) -> tuple[Tensor | None, Tensor]:
        """Logits of both."""
        return None if clean is None else self.network(clean).float(), self.network(adversarial).float()


@dataclass
class Losses:
    """Losses ``[B]`` and logits of one batch; ``clean`` is None where the objective does not look at clean images."""

    loss: Tensor
    clean: Tensor | None
    adversarial: Tensor


class Objective:
    """The recipe's objective as a function of a batch.

    Args:
        recipe: the recipe.
        threat: the threat model that full strength means.
        weight: TRADES weight, from the plan or the recipe.
        network: the bare network, which is attacked.
        both: wrapped `Both` of the same network, which is differentiated.
        devices: for the precision of the bare network.
    """

    def __init__(
        self, recipe: Recipe, threat: ThreatModel, weight: float, network: nn.Module, both: nn.Module, devices: Devices
    ) -> None:
        self.recipe, self.threat, self.weight = recipe, threat, weight
        self.network, self.both, self.devices = network, both, devices
        linf = threat.norm == "Linf"
        self.start = recipe.attack_start_linf if linf else recipe.attack_start_l2
        self.step_size = (recipe.attack_step_linf if linf else recipe.attack_step_l2) * threat.eps

    def attack(self, images: Tensor, labels: Tensor, eps: Tensor, noise: Tensor | None) -> Tensor:
        """The perturbed images; the network's statistics and gradients are left alone."""
        with attack_mode(self.network, self.recipe.attack_batchnorm), self.devices.autocast():
            return ascend(
                self._ascended(images, labels),
                images,
                eps,
                noise,
                self.threat,
                steps=self.recipe.attack_steps,
                step_size=self.step_size,
            )

    def losses(self, images: Tensor, adversarial: Tensor, labels: Tensor, eps: Tensor) -> Losses:
        """The loss of every image, with a graph to the parameters."""
        recipe = self.recipe
        needed = None if recipe.objective == "pgd-at" else images
        clean, attacked = self.both(needed, adversarial)
        if recipe.objective == "pgd-at":
            loss = objectives.pgd_at(attacked, labels, smoothing=recipe.label_smoothing)
        elif recipe.objective == "mart":
            loss = objectives.mart(clean, attacked, labels, weight=self.weight, attacked=eps > 0)
        else:
            loss = objectives.trades(
                clean,
                attacked,
                labels,
                weight=self.weight,
                smoothing=recipe.label_smoothing,
                smooth_both=recipe.smooth_both_terms,
                detach_clean=recipe.detach_clean,
                attacked=eps > 0,
            )
        return Losses(loss, clean, attacked)

    def _ascended(self, images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        if self.recipe.objective != "trades" or labels.is_floating_point():
            return lambda x: objectives.cross_entropy(self.network(x).float(), labels)
        with torch.no_grad():
            reference = self.network(images).float()
        return lambda x: objectives.kl_divergence(self.network(x).float(), reference)
