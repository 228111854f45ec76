"""The attacks by name, and how one batch is attacked.

``"standard"`` is AutoAttack standard (arXiv 2003.01690): APGD-CE, targeted APGD-DLR, targeted FAB and Square, each
only on the images that withstood the ones before. The others (``"apgd-ce"``, ``"pgd-20"``, ``"cw-20"``) are single,
weaker attacks: what they report is an upper bound.
"""

from __future__ import annotations

import re
import sys
from typing import Any, cast

import torch
from pyautoattack import AutoAttack, checks
from torch import Tensor

from puma.attacks.pgd import pgd
from puma.errors import UsageError, unknown
from puma.evaluation.flags import FlagRecorder
from puma.evaluation.network import CountedNetwork, generator
from puma.threat import ThreatModel

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
NAMES = ("standard", "clean", "apgd-ce", "pgd-K", "cw-K")


def attack_steps(attack: str) -> tuple[str, ...]:
    """The attacks that ``attack`` runs, in order.

    >>> attack_steps("standard")
    ('apgd-ce', 'apgd-t', 'fab-t', 'square')
    >>> attack_steps("clean"), attack_steps("pgd-20")
    ((), ('pgd-20',))

    Raises:
        UsageError: unknown name.
    """
    if attack == "standard":
        return STANDARD
    if attack == "clean":
        return ()
    if attack == "apgd-ce" or re.fullmatch(r"(pgd|cw)-[1-9]\d*", attack):
        return (attack,)
    raise unknown("attack", attack, [*NAMES[:3], "pgd-20", "cw-20"])


def full_cost(step: str, targets: int) -> int:
    """Forward-equivalents that one attack spends on an image that withstands it."""
    gradient = 2
    if step == "apgd-ce":
        return 1 + 101 * gradient + 1
    if step == "apgd-t":
        return 1 + targets * (1 + 101 * gradient) + 1
    if step == "fab-t":
        return 1 + targets * (2 + 100 * (gradient + 1) + 1) + 1
    if step == "square":
        return 1 + 1 + 5000 + 1 + 1
    return int(step.split("-")[1]) * gradient + 1


class Attacker:
    """Attacks batches of images that the model classifies correctly.

    Args:
        network: the model, in eval mode.
        threat: norm and radius.
        classes: how many logits there are.
        seed: every batch of every attack starts from it, as in AutoAttack.
        device: where images lie.
        recorder: takes AutoAttack's warnings.
    """

    def __init__(
        self,
        network: CountedNetwork,
        threat: ThreatModel,
        *,
        classes: int,
        seed: int,
        device: torch.device,
        recorder: FlagRecorder,
    ) -> None:
        self.network, self.threat, self.seed, self.device = network, threat, seed, device
        self.targets = min(9, classes - 1)
        suite = AutoAttack(network, norm=threat.norm, eps=threat.eps, seed=seed, version="standard", device=device)
        suite.apgd.loss = "ce"
        suite.apgd.logger = suite.apgd_targeted.logger = recorder
        # the library asks for 9 targets whatever the number of classes, and then fails on fewer than ten
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = self.targets
        suite.fab.targeted = True
        self._suite: dict[str, Any] = {
            "apgd-ce": suite.apgd,
            "apgd-t": suite.apgd_targeted,
            "fab-t": suite.fab,
            "square": suite.square,
        }

    def perturb(self, step: str, images: Tensor, labels: Tensor, offset: int) -> Tensor:
        """Attack one batch with ``step``; the result has the batch's shape, unbroken images in any state.

        Args:
            step: one of `attack_steps`.
            images: float32 ``[B, C, H, W]``, all classified correctly.
            labels: int64 ``[B]``.
            offset: row of the first image, which gives PGD's start its own random numbers.
        """
        if step in self._suite:
            # the library seeds torch's global generators; ours are put back
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                self._suite[step].seed = self.seed
                return cast(Tensor, self._suite[step].perturb(images.clone(), labels.clone()))
        loss, _, steps = step.partition("-")
        return pgd(
            self.network,
            images,
            labels,
            threat=self.threat,
            steps=int(steps),
            step_size=self.threat.eps / 4,
            loss="ce" if loss == "pgd" else "cw",
            generator=generator(self.device, self.seed, offset),
        )


def check_classes(attack: str, classes: int) -> None:
    """Refuse AutoAttack where it is not defined.

    Raises:
        UsageError: AutoAttack standard on fewer than four classes.
    """
    if attack == "standard" and classes < 4:
        raise UsageError(
            f"AutoAttack standard needs four classes; this model has {classes}",
            why="its targeted DLR loss compares the third and fourth largest logits",
            fix='use attack="apgd-ce" or "cw-20" and name it beside the figure',
        )


def check_model(network: CountedNetwork, images: Tensor, labels: Tensor, recorder: FlagRecorder) -> None:
    """AutoAttack's checks of the model on one batch: is it randomised, does it return probabilities, is it dynamic."""
    with torch.no_grad():
        checks.check_randomized(network, images, labels, bs=len(images), logger=recorder)
        checks.check_range_output(network, images, logger=recorder)
    tracer = sys.gettrace()
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # the library never forgets a dynamic model it has seen
    try:
        checks.check_dynamic(network, images, logger=recorder)
    finally:
        sys.settrace(tracer)
