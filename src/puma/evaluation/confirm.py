"""Images that an attack claims to have broken, judged once more and held against the threat model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puma.errors import CheckError
from puma.threat import ThreatModel

SLACK = 1e-5
"""Float32 rounding of image + perturbation that is tolerated, in pixel units."""
KNIFE_EDGE = 1e-3
"""Relative gap of logits below which the winner may change with the composition of the batch."""


def confirm(
    network: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, threat: ThreatModel, step: str
) -> int:
    """Judge broken images again, in another order, and check that each perturbation was allowed.

    Args:
        network: from images to logits.
        images: float32 ``[B, C, H, W]``, before the attack.
        adversarial: float32 ``[B, C, H, W]``, as the attack left them.
        labels: int64 ``[B]``.
        threat: norm and radius.
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
            f"the model's logits are NaN or infinite for images that {step} made",
            why="they would count as broken without being adversarial",
            fix="look for a division, logarithm or overflow in the model",
        )
    if not bool(allowed.all()):
        raise CheckError(
            f"{int((~allowed).sum())} of {len(images)} images that {step} made lie outside {threat} or [0, 1]",
            why=f"the largest perturbation is {float(size.max()):.6g}",
            fix="the figure would be too low; please report this with the model",
        )
    place = labels.unsqueeze(1)
    lead = logits.gather(1, place).squeeze(1) - logits.scatter(1, place, -torch.inf).amax(1)
    contradicted = lead > KNIFE_EDGE * logits.abs().amax(1).clamp_min(1)
    if bool(contradicted.any()):
        raise CheckError(
            f"{int(contradicted.sum())} of {len(images)} images broken by {step} are correct when judged again",
            why="the model's answers change from call to call or with the batch",
            fix="switch dropout and noise off at test time",
        )
    return int((lead > 0).sum())
