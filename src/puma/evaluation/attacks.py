"""The attacks by name, one batch at a time; what they claim to have broken; mislabelled perturbations; warnings.

``"standard"`` is AutoAttack standard (arXiv 2003.01690): APGD-CE, targeted APGD-DLR, targeted FAB and Square, each
only on the images that withstood the ones before. The others are weaker and give an upper bound of robust accuracy:
``"apgd-ce"`` and ``"pgd-20"`` attack the cross-entropy, and what withstands it by PGD on the CW loss, since the
gradient of the cross-entropy vanishes where a model is confident; ``"cw-20"`` is the CW loss alone.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pyautoattack import AutoAttack, checks
from torch import Tensor, nn

from puma.attacks.pgd import LOSSES, Loss, pgd
from puma.data.pool import Pool, read_batch
from puma.errors import CheckError, DataError, ModelError, UsageError, unknown
from puma.models.checks import apply_model, attack_mode, device_of, true_float32
from puma.plan import Plan
from puma.progress import Progress
from puma.rng import batch_seed, mixed_key, permuted
from puma.threat import ThreatModel

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_SLACK = 1e-5  # float32 rounding of image + perturbation that is tolerated, in pixel units
_ROUNDING = 1e-3  # relative gap of logits below which the predicted class may change with the rest of the batch


def attack_steps(attack: str) -> tuple[str, ...]:
    """The attacks that ``attack`` runs, in order; `UsageError` for an unknown name.

    >>> attack_steps("apgd-ce"), attack_steps("cw-20"), attack_steps("clean")
    (('apgd-ce', 'cw-20'), ('cw-20',), ())
    """
    named: dict[str, tuple[str, ...]] = {"standard": STANDARD, "clean": (), "apgd-ce": ("apgd-ce", "cw-20")}
    if attack in named:
        return named[attack]
    if match := re.fullmatch(r"(pgd|ce-cw|cw)-([1-9]\d*)", attack):  # pgd-20 and ce-cw-20 are one attack
        return (f"pgd-{match[2]}", f"cw-{match[2]}")[match[1] == "cw" :]
    raise unknown("attack", attack, [*named, "pgd-20", "cw-20"])


def num_targets(attack: str, classes: int) -> int:
    """How many classes the targeted attacks try; `UsageError` for AutoAttack standard on fewer than four classes."""
    if attack == "standard" and classes < 4:
        what = f"AutoAttack standard needs four classes; this model has {classes}"
        why = "its targeted DLR loss compares the third and fourth largest logits"
        raise UsageError(what, why=why, fix='use attack="apgd-ce" or "cw-20"')
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


def square_fails(height: int, width: int) -> bool:
    """Whether pyautoattack's Square fails in L2 on images of this size.

    Its first perturbation is a grid of tiles of side ``s = height // 5``, laid from the margin ``(height - 5 s) // 2``
    without a look at the border.

    >>> [side for side in range(1, 400) if square_fails(side, side)]
    [1, 2, 3, 4, 12, 14, 18, 19, 24]
    """
    side = height // 5
    margin = (height - 5 * side) // 2
    beyond = any(margin + size // max(side, 1) * side > size for size in (height, width))
    return side == 0 or (side > 1 and width >= side and beyond)


class Attacker:
    """Attacks batches of images that ``network``, in eval mode, classifies correctly.

    Every batch of every attack starts from ``seed``, as in AutoAttack, whose warnings ``recorder`` counts.
    """

    def __init__(self, network: nn.Module, threat: ThreatModel, *, targets: int, seed: int) -> None:
        self.network, self.threat, self.seed, self.recorder = network, threat, seed, WarningCounter()
        self.device = device = device_of(network)
        suite = AutoAttack(network, norm=threat.norm, eps=threat.eps, seed=seed, version="standard", device=device)
        suite.apgd.loss = "ce"
        suite.apgd.logger = suite.apgd_targeted.logger = self.recorder
        # the library asks for 9 targets whatever the number of classes, and then fails on fewer than ten
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = targets
        suite.fab.targeted = True
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


# --- the model under attack ------------------------------------------------------------------------------------------


class CountedNetwork(nn.Module):
    """``model`` with the ``cost`` of its passes: 1 for an image, 2 with its gradient; ``on_pass`` is told of each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cost = model, 0
        self.on_pass: Callable[[int], None] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        logits = apply_model(self.model, images.clone())  # some models write into their input
        cost = len(images) * (2 if images.requires_grad and torch.is_grad_enabled() else 1)
        self.cost += cost
        if self.on_pass is not None:
            self.on_pass(cost)
        return logits


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While inside: eval mode, frozen, true float32 (no TF32, no autocast); `ModelError` for weights that are not."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            what = f"the model's weights are {str(tensor.dtype).removeprefix('torch.')} (at {name!r})"
            why = "accuracies are measured in float32; half precision would hide gradients from the attacks"
            raise ModelError(what, why=why, fix="evaluate model.float()")
    with attack_mode(model, "eval"), true_float32(device_of(model).type):
        yield


# --- mislabelled perturbed data of a training -----------------------------------------------------------------------


class MislabelledShares(NamedTuple):
    """Shares of the kept training images, in [0, 1], whose perturbed image a reference model gives another class."""

    share: float  # all of them, also those that the reference model gets wrong unperturbed: their label is in doubt
    by_attack: float  # those that it gets right unperturbed: mislabelled by the attack alone


def mislabelled_shares(
    model: nn.Module,
    reference: nn.Module,
    pool: Pool,
    plan: Plan,
    threat: ThreatModel,
    *,
    sample: int | None = None,
    loss: Loss = "kl",
    steps: int = 10,
    batch_size: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> MislabelledShares:
    """Measure them on the perturbed images of training: PGD against the model being trained, at each image's own eps.

    ``reference`` is an accurate model that did not score the margins (margin < eps_i alone would be true by
    construction). ``sample`` kept images, chosen at random, or all; ``loss`` and ``steps`` of PGD: ``"kl"`` to the
    clean prediction as in TRADES, or ``"ce"`` with the label as in PGD-AT.

    `DataError` where plan and pool do not belong together or nothing is kept; `UsageError` for another norm than the
    plan's, or an empty sample.
    """
    pool.check_plan(plan)
    if plan.threat.norm != threat.norm:
        raise UsageError(f"the plan is for {plan.threat}, not for {threat}")
    rows = np.flatnonzero(plan.keep)
    if not len(rows):
        raise DataError("the plan keeps no image")
    if sample is not None and sample < 1:
        raise UsageError(f"a sample of {sample} images", fix="1 or more, or None for all")
    if sample is not None and sample < len(rows):
        rows = np.sort(rows[permuted(np.arange(sample), len(rows), mixed_key(seed, 0))])
    device, other, wrong, by_attack = device_of(model), device_of(reference), 0, 0
    bar = Progress("perturbed images", len(rows), "images", show=progress)
    with bar, evaluation_mode(model), evaluation_mode(reference):
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            images, labels = read_batch(pool, chosen, device)
            given: dict[str, Any] = {"threat": threat, "eps": plan.eps[chosen], "steps": steps, "loss": loss}
            start_noise = torch.Generator(device).manual_seed(batch_seed(seed, start))
            both = images, pgd(model, images, labels, generator=start_noise, **given)
            with torch.no_grad():
                right = [apply_model(reference, one.to(other)).argmax(1).to(device) == labels for one in both]
            wrong += int((~right[1]).sum())
            by_attack += int((right[0] & ~right[1]).sum())
            bar.advance(len(chosen))
    return MislabelledShares(wrong / len(rows), by_attack / len(rows))


# --- AutoAttack's warnings, after flags_doc.md of fra31/auto-attack ------------------------------------------------


WARNINGS = {
    "randomised": (
        "randomized defense",
        "the model answers the same images differently when asked again: AutoAttack standard overestimates it",
        "switch dropout and noise off at test time; a randomised defence needs attacks averaged over its randomness",
    ),
    "probabilities": (
        "probability distribution",
        "the model seems to return softmax outputs, on which gradients vanish where it is confident",
        "return logits: remove the softmax at the end of the model",
    ),
    "dynamic": (
        "dynamic defense",
        "the model computes gradients inside its forward pass, which makes attacks that do not know of it too weak",
        "remove the optimisation at test time, or attack the model with it in mind",
    ),
    "zero-gradient": (
        "zero gradient",
        "the loss of some attacked images has no gradient at all: only FAB and Square may still break them",
        "look for quantisation, saturation or masking; trust no gradient attack if Square breaks many of them",
    ),
    "square-gains": (
        "Square Attack has decreased",
        "Square, without gradients, broke more than 0.2 % of what withstood the others: a sign of masked gradients",
        "run more and adaptive attacks before trusting the figure",
    ),
}
"""By the short name in ``evaluation.json``: part of AutoAttack's message, what it means, what to do about it."""


class WarningCounter(Counter[str]):
    """Takes the place of AutoAttack's logger and counts its warnings by their short names; others by their words."""

    def warning(self, text: str) -> None:
        """Count a warning."""
        self[next((flag for flag, known in WARNINGS.items() if known[0] in text), text)] += 1

    def info(self, text: str) -> None:
        """Ignore it."""

    debug = info


def explain(raised: Mapping[str, int]) -> list[dict[str, str | int]]:
    """The warnings that were raised, with what they mean and what to do, in the order of `WARNINGS`."""
    order = [flag for flag in [*WARNINGS, *(set(raised) - set(WARNINGS))] if raised.get(flag)]
    unknown = ("", "a warning that this version does not know", "read AutoAttack's flags_doc.md")
    known = [(flag, *WARNINGS.get(flag, unknown)) for flag in order]
    return [{"flag": flag, "times": raised[flag], "means": means, "do": do} for flag, _, means, do in known]
