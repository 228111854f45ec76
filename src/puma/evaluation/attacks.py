"""The attacks by name, one batch at a time, and the check of what they claim to have broken.

``"standard"`` is AutoAttack standard (arXiv 2003.01690): APGD-CE, targeted APGD-DLR, targeted FAB and Square, each
only on the images that withstood the ones before. The others are weaker and give an upper bound of robust accuracy:
``"apgd-ce"`` and ``"pgd-20"`` attack the cross-entropy, and what withstands it by PGD on the CW loss, since the
gradient of the cross-entropy vanishes where a model is confident; ``"cw-20"`` is the CW loss alone.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from pyautoattack import AutoAttack, checks
from torch import Tensor, nn

from puma.attacks.pgd import LOSSES, Loss, pgd
from puma.errors import CheckError, UsageError, unknown
from puma.evaluation.inputs import CountedNetwork
from puma.evaluation.square import SquareL2, library_fails
from puma.rng import batch_seed
from puma.threat import ThreatModel

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
SLACK = 1e-5
"""Float32 rounding of image + perturbation that is tolerated, in pixel units."""
ROUNDING = 1e-3
"""Relative gap of logits below which the predicted class may change with the composition of the batch."""


def attack_steps(attack: str) -> tuple[str, ...]:
    """The attacks that ``attack`` runs, in order.

    >>> attack_steps("standard")
    ('apgd-ce', 'apgd-t', 'fab-t', 'square')
    >>> attack_steps("clean"), attack_steps("apgd-ce"), attack_steps("cw-20")
    ((), ('apgd-ce', 'cw-20'), ('cw-20',))
    >>> attack_steps("pgd-10"), attack_steps("ce-cw-10")  # two names of one attack
    (('pgd-10', 'cw-10'), ('pgd-10', 'cw-10'))

    Raises:
        UsageError: unknown name.
    """
    if attack == "standard":
        return STANDARD
    if attack == "clean":
        return ()
    if attack == "apgd-ce":
        return ("apgd-ce", "cw-20")
    if match := re.fullmatch(r"(pgd|ce-cw|cw)-([1-9]\d*)", attack):
        both = (f"pgd-{match[2]}", f"cw-{match[2]}")
        return both[1:] if match[1] == "cw" else both
    raise unknown("attack", attack, ["standard", "clean", "apgd-ce", "pgd-20", "cw-20"])


def full_cost(step: str, targets: int) -> int:
    """Forward-equivalents that one attack costs for an image that withstands it, with the check of its gradient."""
    gradient = 2
    if step == "apgd-ce":
        return gradient + 1 + 101 * gradient + 1
    if step == "apgd-t":
        return 1 + targets * (1 + 101 * gradient) + 1
    if step == "fab-t":
        return 1 + targets * (2 + 100 * (gradient + 1) + 1) + 1
    if step == "square":
        return 1 + 1 + 5000 + 1 + 1
    return gradient + int(step.split("-")[1]) * gradient + 1


class Attacker:
    """Attacks batches of images that the model classifies correctly.

    Args:
        network: the model, in eval mode.
        threat: norm and eps.
        classes: number of logits.
        image_size: height and width.
        seed: every batch of every attack starts from it, as in AutoAttack.
        device: where images lie.
        recorder: receives AutoAttack's warnings.

    Raises:
        UsageError: see `check_classes`.
    """

    def __init__(
        self,
        network: CountedNetwork,
        threat: ThreatModel,
        *,
        classes: int,
        image_size: tuple[int, int],
        seed: int,
        device: torch.device,
        recorder: WarningRecorder,
    ) -> None:
        self.network, self.threat, self.seed, self.device = network, threat, seed, device
        self.recorder = recorder
        self.targets = min(9, classes - 1)
        suite = AutoAttack(network, norm=threat.norm, eps=threat.eps, seed=seed, version="standard", device=device)
        suite.apgd.loss = "ce"
        suite.apgd.logger = suite.apgd_targeted.logger = recorder
        # the library asks for 9 targets whatever the number of classes, and then fails on fewer than ten
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = self.targets
        suite.fab.targeted = True
        if threat.norm == "L2" and library_fails(*image_size):
            square = {name: getattr(suite.square, name) for name in ("p_init", "n_queries", "n_restarts")}
            suite.square = SquareL2(
                network, norm="L2", eps=threat.eps, seed=seed, device=device, resc_schedule=False, **square
            )
        self._suite: dict[str, Any] = dict(
            zip(STANDARD, (suite.apgd, suite.apgd_targeted, suite.fab, suite.square), strict=True)
        )

    def perturb(self, step: str, images: Tensor, labels: Tensor, offset: int) -> Tensor:
        """Attack one batch with ``step``.

        Args:
            step: one of `attack_steps`.
            images: float32 ``[B, C, H, W]``, all classified correctly.
            labels: int64 ``[B]``.
            offset: row of the first image, from which PGD's random start is seeded.

        Returns:
            float32 ``[B, C, H, W]``; images that withstand are in any state.
        """
        loss: Loss = "cw" if step.startswith("cw") else "ce"
        if step not in STANDARD[1:] and has_zero_gradient(self.network, images, labels, loss):
            self.recorder.raised["zero-gradient"] += 1
        if step in self._suite:
            # the library seeds torch's global generators; their state is restored
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                self._suite[step].seed = self.seed
                return cast(Tensor, self._suite[step].perturb(images.clone(), labels.clone()))
        return pgd(
            self.network,
            images,
            labels,
            threat=self.threat,
            steps=int(step.partition("-")[2]),
            step_size=self.threat.eps / 4,
            loss=loss,
            generator=torch.Generator(self.device).manual_seed(batch_seed(self.seed, offset)),
            warn=self.recorder.warning,
        )


def has_zero_gradient(network: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> bool:
    """Whether the loss of some image ``[B, C, H, W]`` has no gradient at all: gradient attacks cannot move it."""
    points = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = LOSSES[loss](network(points), labels).sum()
        (gradient,) = torch.autograd.grad(total, points)
    return bool((gradient == 0).flatten(1).all(1).any())


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


def check_autoattack(network: CountedNetwork, images: Tensor, labels: Tensor, recorder: WarningRecorder) -> None:
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


def confirm(
    network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, threat: ThreatModel, step: str
) -> int:
    """Evaluate broken images again, in another order, and check that each perturbation was allowed.

    Args:
        network: from images to logits.
        images: float32 ``[B, C, H, W]``, before the attack.
        adversarial: float32 ``[B, C, H, W]``, after it.
        labels: int64 ``[B]``.
        threat: norm and eps.
        step: name of the attack, for messages.

    Returns:
        How many are correct after all by a gap that rounding explains. They still count as broken, as in AutoAttack.

    Raises:
        CheckError: outside the threat model or [0, 1], logits not finite, or correct again by more than rounding.
    """
    if not len(images):
        return 0
    delta = (adversarial - images).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "Linf" else delta.norm(dim=1)
    allowed = (size <= threat.eps + SLACK) & ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
    logits = network(adversarial.flip(0)).flip(0)
    if not bool(torch.isfinite(logits).all()):
        raise CheckError(
            f"the model's logits are NaN or infinite for images perturbed by {step}",
            why="they would count as broken without being adversarial",
            fix="look for a division, logarithm or overflow in the model",
        )
    if not bool(allowed.all()):
        raise CheckError(
            f"{int((~allowed).sum())} of {len(images)} images perturbed by {step} lie outside {threat} or [0, 1]",
            why=f"the largest perturbation is {float(size.max()):.6g}",
            fix="the figure would be too low; please report this with the model",
        )
    index = labels.unsqueeze(1)
    lead = logits.gather(1, index).squeeze(1) - logits.scatter(1, index, -torch.inf).amax(1)
    contradicted = lead > ROUNDING * logits.abs().amax(1).clamp_min(1)
    if bool(contradicted.any()):
        raise CheckError(
            f"{int(contradicted.sum())} of {len(images)} images broken by {step} are correct when evaluated again",
            why="the model's answers change from call to call or with the batch",
            fix="switch dropout and noise off at test time",
        )
    return int((lead > 0).sum())


# --- AutoAttack's warnings, after flags_doc.md of fra31/auto-attack ------------------------------------------------


class AttackWarning(NamedTuple):
    """A part of AutoAttack's message, what it says about the model or the figure, and what to do about it."""

    text: str
    means: str
    do: str


WARNINGS = {
    "randomised": AttackWarning(
        "randomized defense",
        "the model answers the same images differently when asked again; AutoAttack standard overestimates the "
        "robustness of such models",
        "switch dropout and noise off at test time; a randomised defence needs attacks averaged over its randomness",
    ),
    "probabilities": AttackWarning(
        "probability distribution",
        "the model seems to return softmax outputs, on which gradients vanish where it is confident",
        "return logits: remove the softmax at the end of the model",
    ),
    "dynamic": AttackWarning(
        "dynamic defense",
        "the model computes gradients inside its forward pass; attacks that do not take this into account are too weak",
        "remove the optimisation at test time, or attack the model with it in mind",
    ),
    "zero-gradient": AttackWarning(
        "zero gradient",
        "the loss of some attacked images has no gradient at all, so that gradient attacks cannot move them; FAB and "
        "Square may still break them",
        "look for quantisation, saturation or masking in the model; if Square breaks many of them, trust no figure "
        "of gradient attacks",
    ),
    "square-gains": AttackWarning(
        "Square Attack has decreased",
        "Square, which uses no gradients, broke more than 0.2 % of the images after the gradient attacks had given "
        "up: a sign of masked gradients",
        "run more and adaptive attacks before trusting the figure",
    ),
}
"""By the short name that ``evaluation.json`` uses."""
_UNKNOWN = AttackWarning("", "a warning that this version does not know", "read AutoAttack's flags_doc.md")


class WarningRecorder:
    """Takes the place of AutoAttack's logger and counts its warnings."""

    def __init__(self) -> None:
        self.raised: Counter[str] = Counter()

    def warning(self, text: str) -> None:
        """Count a warning by its short name; an unknown text counts under its own words."""
        self.raised[next((flag for flag, known in WARNINGS.items() if known.text in text), text)] += 1

    def info(self, text: str) -> None:
        """Ignore it."""

    debug = info


def explain(raised: Mapping[str, int]) -> list[dict[str, str | int]]:
    """The warnings that were raised, with what they mean and what to do, in the order of `WARNINGS`.

    >>> explain({"probabilities": 1})[0]["do"]
    'return logits: remove the softmax at the end of the model'
    """
    order = [flag for flag in [*WARNINGS, *(set(raised) - set(WARNINGS))] if raised.get(flag)]
    rows = [(flag, WARNINGS.get(flag, _UNKNOWN)) for flag in order]
    return [{"flag": flag, "times": raised[flag], "means": known.means, "do": known.do} for flag, known in rows]
