"""One adversarial training step, up to the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from puma import losses
from puma.attacks.pgd import Rows, ascend, ascend_in_proportion
from puma.distribute import Devices
from puma.models.batchnorm import attack_mode, kept_statistics
from puma.threat import ThreatModel
from puma.training.recipe import Recipe


class Both(nn.Module):
    """The network on the clean and on the perturbed images, as two passes in one call.

    Two passes, because each is normalised by its own batch; one call, because a wrapper for several processes has to
    see one forward pass for each backward pass. Either may be None.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, clean: Tensor | None, adversarial: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Logits of both."""
        logits = [None if images is None else self.network(images).float() for images in (clean, adversarial)]
        return logits[0], logits[1]


@dataclass
class Losses:
    """Losses ``[B]`` and logits of one batch; ``clean`` is None where the objective does not look at clean images."""

    loss: Tensor
    clean: Tensor | None
    adversarial: Tensor

    @torch.no_grad()
    def summary(self, labels: Tensor, eps: Tensor) -> Tensor:
        """Loss, clean and adversarial hits, eps and images of the batch, float32 ``[5]`` sums on its device."""
        wanted = labels.argmax(1) if labels.is_floating_point() else labels
        hits = (self.adversarial.argmax(1) == wanted).sum()
        clean = torch.zeros_like(hits) if self.clean is None else (self.clean.argmax(1) == wanted).sum()
        return torch.stack([self.loss.sum(), clean, hits, eps.sum(), torch.ones_like(eps).sum()])


class Objective:
    """The recipe's objective as a function of a batch.

    Args:
        recipe: the recipe.
        threat: the threat model that full strength means.
        weight: TRADES weight, from the plan or the recipe.
        network: the bare network, whose mode is set while it is attacked.
        bare: what is called in the attack: ``network`` itself, or ``torch.compile`` of it.
        both: wrapped `Both` of ``bare``, which is differentiated.
        devices: for the precision of the bare network.
    """

    def __init__(
        self,
        recipe: Recipe,
        threat: ThreatModel,
        weight: float,
        network: nn.Module,
        bare: Callable[[Tensor], Tensor],
        both: nn.Module,
        devices: Devices,
    ) -> None:
        self.recipe, self.threat, self.weight = recipe, threat, weight
        self.network, self.both, self.devices = network, both, devices
        self.bare: Callable[[Tensor], Tensor] = bare
        self.gradients = 0  # of one image, computed by the attack
        linf = threat.norm == "Linf"
        self.start = recipe.attack_start_linf if linf else recipe.attack_start_l2
        self.step_size = (recipe.attack_step_linf if linf else recipe.attack_step_l2) * threat.eps
        self._one_clean_pass = (
            recipe.objective == "trades"
            and recipe.attack_batchnorm == "train"
            and not recipe.awp  # it moves the weights between the two
            and devices.world == 1  # a wrapper for several has to see both passes in one call
            and not any(isinstance(module, _DropoutNd) for module in network.modules())
        )

    def clean_pass(self, images: Tensor, labels: Tensor) -> Tensor | None:
        """The clean logits, with a graph, where one pass can serve both the attack and the loss; else None.

        It can where the attack maximises the distance to the clean prediction, and would compute it with the same
        weights and batch statistics as the loss does: the same bits, and the memory that the loss needs anyway.
        """
        shared = self._one_clean_pass and not labels.is_floating_point()
        clean: Tensor | None = self.both(images, None)[0] if shared else None
        return clean

    def attack(
        self, images: Tensor, labels: Tensor, eps: Tensor, noise: Tensor | None, clean: Tensor | None = None
    ) -> Tensor:
        """The perturbed images; the network's statistics and gradients are left alone. ``clean``: of `clean_pass`."""
        steps = self.recipe.attack_steps
        with attack_mode(self.network, self.recipe.attack_batchnorm), self.devices.autocast():
            objective = self._ascended(images, labels, clean)
            if self.recipe.attack_schedule == "fixed":
                self.gradients += steps * len(images)
                return ascend(objective, images, eps, noise, self.threat, steps=steps, step_size=self.step_size)
            adversarial, gradients = ascend_in_proportion(
                objective, images, eps, noise, self.threat, steps=steps, step_size=self.step_size
            )
        self.gradients += gradients
        return adversarial

    def losses(
        self, images: Tensor, adversarial: Tensor, labels: Tensor, eps: Tensor, clean: Tensor | None = None
    ) -> Losses:
        """The loss of every image, with a graph to the parameters. ``clean``: of `clean_pass`, for the same images."""
        needed = None if self.recipe.objective == "pgd-at" or clean is not None else images
        fresh, attacked = self.both(needed, adversarial)
        return self._combined(fresh if clean is None else clean, attacked, labels, eps)

    def bare_loss(self, images: Tensor, adversarial: Tensor, labels: Tensor, eps: Tensor) -> Tensor:
        """The mean loss by the bare network, which leaves running statistics alone."""
        with kept_statistics(self.network), self.devices.autocast():
            clean = None if self.recipe.objective == "pgd-at" else self.bare(images).float()
            return self._combined(clean, self.bare(adversarial).float(), labels, eps).loss.mean()

    def _combined(self, clean: Tensor | None, attacked: Tensor, labels: Tensor, eps: Tensor) -> Losses:
        recipe = self.recipe
        if clean is None:
            loss = losses.pgd_at(attacked, labels, smoothing=recipe.label_smoothing)
        elif recipe.objective == "mart":
            loss = losses.mart(clean, attacked, labels, weight=self.weight, attacked=eps > 0)
        else:
            loss = losses.trades(
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

    def _ascended(self, images: Tensor, labels: Tensor, clean: Tensor | None) -> Callable[[Tensor, Rows], Tensor]:
        if self.recipe.objective != "trades" or labels.is_floating_point():
            return lambda x, rows: losses.cross_entropy(self.bare(x).float(), labels[rows])
        with torch.no_grad():
            reference = self.bare(images).float() if clean is None else clean.detach()
        return lambda x, rows: losses.kl_divergence(self.bare(x).float(), reference[rows])
