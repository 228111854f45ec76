"""The attacks by name, one batch at a time, the check of what they claim to have broken, and AutoAttack's warnings.

``"standard"`` is AutoAttack standard (arXiv 2003.01690): APGD-CE, targeted APGD-DLR, targeted FAB and Square, each
only on the images that withstood the ones before. The others are weaker and give an upper bound of robust accuracy:
``"apgd-ce"`` and ``"pgd-20"`` attack the cross-entropy, and what withstands it by PGD on the CW loss, since the
gradient of the cross-entropy vanishes where a model is confident; ``"cw-20"`` is the CW loss alone.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from pyautoattack import AutoAttack, checks
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from puma.attacks.pgd import LOSSES, Loss, pgd
from puma.errors import CheckError, UsageError, unknown
from puma.models.checks import device_of
from puma.rng import batch_seed
from puma.threat import ThreatModel

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_SLACK = 1e-5  # float32 rounding of image + perturbation that is tolerated, in pixel units
_ROUNDING = 1e-3  # relative gap of logits below which the predicted class may change with the rest of the batch


def attack_steps(attack: str) -> tuple[str, ...]:
    """The attacks that ``attack`` runs, in order; `UsageError` for an unknown name.

    >>> attack_steps("apgd-ce"), attack_steps("cw-20"), attack_steps("clean")
    (('apgd-ce', 'cw-20'), ('cw-20',), ())
    >>> attack_steps("pgd-10"), attack_steps("ce-cw-10")  # two names of one attack
    (('pgd-10', 'cw-10'), ('pgd-10', 'cw-10'))
    """
    named: dict[str, tuple[str, ...]] = {"standard": STANDARD, "clean": (), "apgd-ce": ("apgd-ce", "cw-20")}
    if attack in named:
        return named[attack]
    if match := re.fullmatch(r"(pgd|ce-cw|cw)-([1-9]\d*)", attack):
        both = (f"pgd-{match[2]}", f"cw-{match[2]}")
        return both[1:] if match[1] == "cw" else both
    raise unknown("attack", attack, [*named, "pgd-20", "cw-20"])


def num_targets(attack: str, classes: int) -> int:
    """How many classes the targeted attacks try; `UsageError` for AutoAttack standard on fewer than four classes."""
    if attack == "standard" and classes < 4:
        what, fix = (
            f"AutoAttack standard needs four classes; this model has {classes}",
            'use attack="apgd-ce" or "cw-20"',
        )
        raise UsageError(what, why="its targeted DLR loss compares the third and fourth largest logits", fix=fix)
    return min(9, classes - 1)


def full_cost(step: str, targets: int) -> int:
    """Forward-equivalents that one attack costs for an image that withstands it, with the check of its gradient."""
    gradient = 2
    costs = {
        "apgd-ce": gradient + 1 + 101 * gradient + 1,
        "apgd-t": 1 + targets * (1 + 101 * gradient) + 1,
        "fab-t": 1 + targets * (2 + 100 * (gradient + 1) + 1) + 1,
        "square": 1 + 1 + 5000 + 1 + 1,
    }
    return costs[step] if step in costs else gradient + int(step.split("-")[1]) * gradient + 1


class Attacker:
    """Attacks batches of images that ``network``, in eval mode, classifies correctly.

    Every batch of every attack starts from ``seed``, as in AutoAttack, whose warnings ``recorder`` counts.
    """

    def __init__(
        self, network: nn.Module, threat: ThreatModel, *, targets: int, image_size: tuple[int, int], seed: int
    ) -> None:
        self.network, self.threat, self.seed, self.recorder = network, threat, seed, WarningCounter()
        self.device = device = device_of(network)
        suite = AutoAttack(network, norm=threat.norm, eps=threat.eps, seed=seed, version="standard", device=device)
        suite.apgd.loss = "ce"
        suite.apgd.logger = suite.apgd_targeted.logger = self.recorder
        # the library asks for 9 targets whatever the number of classes, and then fails on fewer than ten
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = targets
        suite.fab.targeted = True
        if threat.norm == "L2" and library_fails(*image_size):
            square = {name: getattr(suite.square, name) for name in ("p_init", "n_queries", "n_restarts")}
            given = {"norm": "L2", "eps": threat.eps, "seed": seed, "device": device, "resc_schedule": False}
            suite.square = SquareL2(network, **given, **square)
        attacks = (suite.apgd, suite.apgd_targeted, suite.fab, suite.square)
        self._suite: dict[str, Any] = dict(zip(STANDARD, attacks, strict=True))

    def perturb(self, step: str, images: Tensor, labels: Tensor, offset: int) -> Tensor:
        """Attack one batch with ``step``, one of `attack_steps`.

        Images are float32 ``[B, C, H, W]``, labels int64 ``[B]``; ``offset`` is the row of the first image, from which
        PGD's random start is seeded. In the result, images that withstand are in any state.
        """
        loss: Loss = "cw" if step.startswith("cw") else "ce"
        if step not in STANDARD[1:]:
            points = images.detach().clone().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(LOSSES[loss](self.network(points), labels).sum(), points)
            self.recorder["zero-gradient"] += bool((gradient == 0).flatten(1).all(1).any())
        if step in self._suite:
            # the library seeds torch's global generators; their state is restored
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                self._suite[step].seed = self.seed
                return cast(Tensor, self._suite[step].perturb(images.clone(), labels.clone()))
        steps, size = int(step.partition("-")[2]), self.threat.eps / 4
        start = torch.Generator(self.device).manual_seed(batch_seed(self.seed, offset))
        given: dict[str, Any] = {"threat": self.threat, "generator": start, "warn": self.recorder.warning}
        return pgd(self.network, images, labels, steps=steps, step_size=size, loss=loss, **given)


def check_autoattack(network: nn.Module, images: Tensor, labels: Tensor, recorder: WarningCounter) -> None:
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
    """Evaluate images ``[B, C, H, W]`` broken by ``step`` again, in another order; check that they are allowed.

    Returns how many are correct after all by a gap that rounding explains (they still count as broken, as in
    AutoAttack); `CheckError` outside the threat model, where logits are not finite, or for a larger gap.
    """
    if not len(images):
        return 0
    delta = (adversarial - images).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "Linf" else delta.norm(dim=1)
    allowed = (size <= threat.eps + _SLACK) & ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
    logits = network(adversarial.flip(0)).flip(0)
    if not bool(torch.isfinite(logits).all()):
        what = f"the model's logits are NaN or infinite for images perturbed by {step}"
        why, fix = "they would count as broken without being adversarial", "look for a division, logarithm or overflow"
        raise CheckError(what, why=why, fix=fix)
    if not bool(allowed.all()):
        what = f"{int((~allowed).sum())} of {len(images)} images perturbed by {step} lie outside {threat} or [0, 1]"
        fix = "the figure would be too low; please report this with the model"
        raise CheckError(what, why=f"the largest perturbation is {float(size.max()):.6g}", fix=fix)
    index = labels.unsqueeze(1)
    lead = logits.gather(1, index).squeeze(1) - logits.scatter(1, index, -torch.inf).amax(1)
    contradicted = lead > _ROUNDING * logits.abs().amax(1).clamp_min(1)
    if bool(contradicted.any()):
        what = f"{int(contradicted.sum())} of {len(images)} images broken by {step} are correct when evaluated again"
        why = "the model's answers change from call to call or with the batch"
        raise CheckError(what, why=why, fix="switch dropout and noise off at test time")
    return int((lead > 0).sum())


# --- AutoAttack's warnings, after flags_doc.md of fra31/auto-attack ------------------------------------------------


WARNINGS = {
    "randomised": (
        "randomized defense",
        "the model answers the same images differently when asked again; AutoAttack standard overestimates the "
        "robustness of such models",
        "switch dropout and noise off at test time; a randomised defence needs attacks averaged over its randomness",
    ),
    "probabilities": (
        "probability distribution",
        "the model seems to return softmax outputs, on which gradients vanish where it is confident",
        "return logits: remove the softmax at the end of the model",
    ),
    "dynamic": (
        "dynamic defense",
        "the model computes gradients inside its forward pass; attacks that do not take this into account are too weak",
        "remove the optimisation at test time, or attack the model with it in mind",
    ),
    "zero-gradient": (
        "zero gradient",
        "the loss of some attacked images has no gradient at all, so that gradient attacks cannot move them; FAB and "
        "Square may still break them",
        "look for quantisation, saturation or masking in the model; if Square breaks many of them, trust no figure "
        "of gradient attacks",
    ),
    "square-gains": (
        "Square Attack has decreased",
        "Square, which uses no gradients, broke more than 0.2 % of the images after the gradient attacks had given "
        "up: a sign of masked gradients",
        "run more and adaptive attacks before trusting the figure",
    ),
}
"""By the short name in ``evaluation.json``: part of AutoAttack's message, what it means, what to do about it."""
_UNKNOWN = ("", "a warning that this version does not know", "read AutoAttack's flags_doc.md")


class WarningCounter(Counter[str]):
    """Takes the place of AutoAttack's logger and counts its warnings by their short names; others by their words."""

    def warning(self, text: str) -> None:
        """Count a warning."""
        self[next((flag for flag, known in WARNINGS.items() if known[0] in text), text)] += 1

    def info(self, text: str) -> None:
        """Ignore it."""

    debug = info


def explain(raised: Mapping[str, int]) -> list[dict[str, str | int]]:
    """The warnings that were raised, with what they mean and what to do, in the order of `WARNINGS`.

    >>> explain({"probabilities": 1})[0]["do"]
    'return logits: remove the softmax at the end of the model'
    """
    order = [flag for flag in [*WARNINGS, *(set(raised) - set(WARNINGS))] if raised.get(flag)]
    known = [(flag, *WARNINGS.get(flag, _UNKNOWN)) for flag in order]
    return [{"flag": flag, "times": raised[flag], "means": means, "do": do} for flag, _, means, do in known]


# --- Square in L2 on the image sizes on which the library's version fails ------------------------------------------


def library_fails(height: int, width: int) -> bool:
    """Whether the library's Square fails in L2 on images of this size.

    Its first perturbation is a grid of tiles of side ``s = height // 5``, laid from the margin ``(height - 5 s) // 2``
    without a look at the border: it fails where a tile reaches beyond the image (sides 12, 14, 18, 19 and 24, and many
    that are not square), and below 5 pixels, where ``s`` is 0.

    >>> [side for side in range(5, 400) if library_fails(side, side)]
    [12, 14, 18, 19, 24]
    >>> library_fails(28, 20), library_fails(4, 4), library_fails(28, 28)
    (True, True, False)
    """
    side = height // 5
    margin = (height - 5 * side) // 2
    beyond = any(margin + size // max(side, 1) * side > size for size in (height, width))
    return side == 0 or (side > 1 and width >= side and beyond)


class SquareL2(SquareAttack):  # type: ignore[misc]  # the library has no types
    """The library's Square in L2 (arXiv 1912.00049) with tiles cut at the border; equal bits where that one works."""

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Attack ``x`` ``[B, C, H, W]``; return the number of queries of each image and the best images."""
        channels, height, width = x.shape[1:]
        grid, tile = torch.zeros_like(x), max(height // 5, 1)
        margin = max((height - tile * 5) // 2, 0)
        for row in range(margin, margin + height // tile * tile, tile):
            for column in range(margin, margin + width // tile * tile, tile):
                pattern = self.eta(tile).view(1, 1, tile, tile) * self.random_choice([len(x), channels, 1, 1])
                place = grid[:, :, row : row + tile, column : column + tile]
                place += pattern[:, :, : place.shape[2], : place.shape[3]]
        best = torch.clamp(x + self.normalize(grid) * self.eps, 0.0, 1.0)
        margins, losses = self.margin_and_loss(best, y)
        queries = torch.ones(len(x)).to(x.device)
        if (margins < 0.0).all():
            return queries, best
        for step in range(self.n_queries):
            rows = (margins > 0.0).nonzero().flatten()
            clean, labels, delta = x[rows], y[rows], best[rows] - x[rows]
            side = max(round(math.sqrt(self.p_selection(step) * height * width)), 3)
            side = min(side + (side % 2 == 0), height, width)
            one, two = self._window(height, width, side), self._window(height, width, side)
            mask = torch.zeros_like(clean)
            mask[one] = mask[two] = 1.0
            norm = self.lp_norm(delta)
            budget = ((delta * mask) ** 2).sum(dim=(-2, -1), keepdim=True).sqrt()  # norm of both windows
            old = delta[one] / (1e-12 + (delta[one] ** 2).sum(dim=(-2, -1), keepdim=True).sqrt())
            pattern = torch.ones([len(rows), channels, side, side]).to(x.device)
            pattern *= self.eta(side).view(1, 1, side, side) * self.random_choice([len(rows), channels, 1, 1])
            pattern += old
            unused = torch.clamp((self.eps * torch.ones_like(pattern)) ** 2 - norm**2, min=0) / channels
            pattern = pattern / (1e-12 + (pattern**2).sum(dim=(-2, -1), keepdim=True).sqrt())
            delta[two] = 0.0
            delta[one] = pattern * (unused + budget**2).sqrt()
            candidate = torch.clamp(clean + self.normalize(delta) * self.eps, 0.0, 1.0)
            margin, loss = self.margin_and_loss(candidate, labels)
            better = loss < losses[rows]
            losses[rows] = torch.where(better, loss, losses[rows])
            better |= margin <= 0.0
            margins[rows] = torch.where(better, margin, margins[rows])
            best[rows] = torch.where(better.view(-1, 1, 1, 1), candidate, best[rows])
            queries[rows] += 1
            if not (margins > 0.0).any():
                break
        return queries, best

    def _window(self, height: int, width: int, side: int) -> tuple[slice, slice, slice, slice]:
        row, column = int(self.random_int(0, height - side)), int(self.random_int(0, width - side))
        return slice(None), slice(None), slice(row, row + side), slice(column, column + side)
