"""DeepFool, batched: how far an image lies from the decision boundary (arXiv 1511.04599), signed, in Linf or L2.

Each step linearizes the boundaries between the label and a few candidate classes and goes the shortest way onto the
nearest one, staying in [0, 1] (`puma.attacks.search`); the better modes rotate the ray from the image to the boundary
until it is shortest (`puma.attacks.refine`). A misclassified image goes into the region of its label, and its margin is
negative. ``docs/margins.md`` explains it with a picture; `benchmarks/margins.py` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.attacks import TUNED
from puma.attacks.halfspace import distances, dual_norm
from puma.attacks.network import Network, as_batch, check_labels
from puma.attacks.refine import Nearest, boundary_steps, locate_crossing, ray_points, rotate, trim, two_nearest
from puma.attacks.search import (
    Crossings,
    Images,
    checked,
    classes,
    deepfool_steps,
    linearize,
    not_crossed,
    strongest,
)
from puma.errors import integer, unknown
from puma.margins import STATUS_NAMES, Status
from puma.models.checks import IT_DEPENDS, check_same
from puma.models.modes import attack_mode, true_float32
from puma.threat import Norm, parse_norm

Mode = Literal["fast", "deepfool", "refined", "tight"]
MODES: tuple[Mode, ...] = get_args(Mode)
Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class SearchBudget:
    """The passes that a mode may spend on an image.

    Args:
        candidates: classes linearized at the image.
        extra_candidates: further ones, linearized only for the images to which they might be nearer.
        rotations: shares of the way that the ray is rotated toward the boundary's normal, one a round.
        tolerance: a ray is left alone when the boundary linearized where it crosses is at most this share nearer.
        boundary_steps: at most, where the boundary bends so that a ray's crossing is not near enough.
        return_steps: boundary steps for a misclassified image.
    """

    candidates: int
    extra_candidates: int = 0
    rotations: tuple[float, ...] = ()
    tolerance: float = 0.0
    boundary_steps: int = 0
    return_steps: int = 0


BUDGETS: dict[Mode, SearchBudget] = {
    "fast": SearchBudget(candidates=3),
    "deepfool": SearchBudget(candidates=2, extra_candidates=2),
    "refined": SearchBudget(candidates=4, rotations=(0.7, 0.4, 0.3), tolerance=0.02, return_steps=1),
    "tight": SearchBudget(
        candidates=5,
        rotations=(0.7, 0.5, 0.4, 0.32, 0.26, 0.22, 0.2, 0.18),
        tolerance=0.01,
        boundary_steps=8,
        return_steps=4,
    ),
}


@dataclass(frozen=True)
class DeepFool:
    """Margins of a batch.

    Args:
        margin: float32 ``[B]``, signed distance in pixel units of [0, 1]; see `puma.margins.Status` for its meaning.
        codes: int8 ``[B]``, codes of `puma.margins.Status`.
        steps: int16 ``[B]``, linearizations spent before the boundary was crossed.
        predicted: int64 ``[B]``, the model's class for the image.
        adversarial: ``[B, ...]``, the point beyond the boundary (inside the label's region for a misclassified image);
            the image itself where none was found.
        passes: images passed forwards and backwards through the model.
    """

    margin: Tensor
    codes: Tensor
    steps: Tensor
    predicted: Tensor
    adversarial: Tensor
    passes: tuple[int, int]

    @property
    def status(self) -> NDArray[np.str_]:
        """Names of the statuses, str ``[B]``."""
        names: NDArray[np.str_] = np.array(STATUS_NAMES)[self.codes.cpu().numpy()]
        return names


def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm = "Linf",
    mode: Mode = "refined",
    steps: int = 50,
    chunk: int = 64,
    precision: Precision = "float32",
    proxy: nn.Module | None = None,
) -> DeepFool:
    """Measure the margins of ``images``.

    Args:
        model: maps float32 images ``[B, ...]`` in [0, 1] to logits ``[B, K]``; in eval mode. It is not changed.
        images: float ``[B, ...]`` in [0, 1]; computed with in float32.
        labels: int ``[B]``.
        norm: ``"Linf"`` or ``"L2"``.
        mode: ``"fast"`` estimates from one linearization and one more forward pass; ``"deepfool"`` is the textbook's;
            ``"refined"`` finds a nearby point of the boundary, ``"tight"`` searches longer for a nearer one.
        steps: linearizations at most before an image counts as unconverged.
        chunk: images per pass through the model.
        precision: ``"bf16"`` computes gradients under bfloat16 autocast; crossings are always seen in float32.
        proxy: a faster stand-in for ``model`` during the search, such as ``torch.compile(model, dynamic=False)``. It is
            given batches of at most four sizes, and every crossing is confirmed by ``model`` itself.

    Raises:
        UsageError: unknown norm, mode or precision.
        DataError: images or labels of the wrong type, shape or range.
        ModelError: training mode; as `puma.models.checks.check_first`; an answer that depends on the other images.
    """
    parse_norm(norm)
    parse_mode(mode)
    parse_precision(precision)
    steps, chunk = integer("steps", steps, low=1), integer("chunk", chunk, low=1)
    with torch.inference_mode(False), torch.no_grad():
        images, labels = as_batch(images, labels)
        network = Network(model, tuple(images.shape[1:]), chunk, precision == "bf16", proxy)
        with true_float32(images.device.type), network.compiling(), attack_mode(model):
            found, crossings = _search(network, images.flatten(1), labels, norm, mode, steps)
            if proxy is not None and mode != "fast":
                _confirm(found, crossings)
    crossed = crossings.distance.isfinite() & ~found.misclassified & (crossings.codes != int(Status.ESTIMATED))
    codes = torch.where(crossed, int(Status.CROSSED), crossings.codes).to(torch.int8)
    margin = torch.where(found.misclassified, -crossings.distance, crossings.distance)
    return DeepFool(
        margin=torch.where(codes >= int(Status.UNCONVERGED), torch.nan, margin),
        codes=codes,
        steps=crossings.steps.to(torch.int16),
        predicted=found.logits0.argmax(1),
        adversarial=crossings.x.view_as(images),
        passes=(network.forwards, network.backwards),
    )


def _search(
    network: Network, x0: Tensor, labels: Tensor, norm: Norm, mode: Mode, steps: int
) -> tuple[Images, Crossings]:
    """Run the stages of a mode."""
    budget = BUDGETS[mode]
    if not len(x0):
        images = Images.of(network, norm, x0, labels, x0.new_zeros(0, 2))
        return images, Crossings(images)
    alone = network.check(x0)
    check_labels(labels, alone.shape[1])
    if alone.shape[1] == 1:
        images = Images.of(network, norm, x0, labels, network.exact(x0))
        return images, Crossings(images)
    images, crossings, first = _first_step(network, x0, labels, norm, budget.candidates, mode)
    check_same(alone[:1], images.logits0[:1], f"{IT_DEPENDS}, or changes from call to call")
    straight, x = first.straight, first.x[first.straight]
    if len(first.ahead):
        ray = locate_crossing(images, crossings, first.ahead, first.nearest, both=mode != "fast")
        if mode == "fast":
            point = ray_points(images, first.ahead, ray.normal, ray.time)
            crossings.distance[first.ahead] = images.length(point - x0[first.ahead])
            crossings.codes[first.ahead] = int(Status.ESTIMATED)
        else:
            ray = rotate(images, crossings, first.ahead, ray, budget.rotations[: steps - 1], budget.tolerance)
            last = trim(images, crossings, first.ahead, ray)
            boundary_steps(images, crossings, first.ahead, 1, budget.boundary_steps, back=False)
            lost = crossings.distance[first.ahead].isinf()
            straight, x = torch.cat([straight, first.ahead[lost]]), torch.cat([x, last[lost]])
    if mode == "fast":
        crossings.x = x0.clone()  # a crossing met on the way is not what an estimate is about
        return images, crossings
    x, logits, short = not_crossed(images, crossings, straight, x)
    x, short = _try_extra_candidates(images, crossings, straight, x, logits, short, first.steepness, budget)
    deepfool_steps(images, crossings, straight[short], x[short], 1, back=False, steps=steps)
    x, _, short = not_crossed(images, crossings, first.back, first.x[first.back])
    deepfool_steps(images, crossings, first.back[short], x[short], budget.candidates, back=True, steps=steps)
    if network.bf16:  # close to a boundary coarse gradients lead nowhere: search again with exact ones
        network.bf16 = False
        lost = crossings.distance.isinf() & ((crossings.codes == int(Status.UNCONVERGED)) | images.misclassified)
        for back in (False, True):
            rows = (lost & (images.misclassified == back)).nonzero().squeeze(1)
            deepfool_steps(images, crossings, rows, x0[rows], budget.candidates, back=back, steps=steps)
        network.bf16 = True
    boundary_steps(images, crossings, first.back, 2 * budget.candidates + 1, budget.return_steps, back=True)
    return images, crossings


class FirstStep(NamedTuple):
    """What one linearization at the images leads to. Rows are int64; misclassified rows of `fast` are done with."""

    ahead: Tensor  # rows with a ray to follow: none in mode deepfool
    straight: (
        Tensor  # correct rows that take plain steps: all in mode deepfool, else those the box keeps from every ray
    )
    back: Tensor  # misclassified rows
    x: Tensor  # [B, D], a step on for the rows ``back`` and, in mode deepfool, ``straight``
    nearest: Nearest  # boundaries of the rows ``ahead``
    steepness: Tensor  # [B], mean dual norm of the gradients


def _first_step(
    network: Network, x0: Tensor, labels: Tensor, norm: Norm, candidates: int, mode: Mode
) -> tuple[Images, Crossings, FirstStep]:
    """Linearize once at the images; the same forward pass gives their logits."""
    rays = mode != "deepfool"
    x, kinds = x0.clone(), torch.zeros_like(labels)  # 1 ahead, 2 straight, 3 back
    status, estimate = torch.zeros_like(labels, dtype=torch.int8), x0.new_full((len(x0),), torch.inf)
    steepness, failed = torch.zeros_like(estimate), torch.zeros_like(labels, dtype=torch.bool)
    logits0: list[Tensor] = []
    boundaries: list[Nearest] = []
    for part, logits, gradients in network.passes(x0):
        logits0.append(network.exact(x0[part], logits))
        images = Images.of(network, norm, x0[part], labels[part], logits0[-1])
        everything = torch.arange(len(images.x0), device=x0.device)
        difference, normals, usable, status[part] = checked(
            *gradients(*classes(images, everything, logits, candidates))
        )
        steepness[part] = dual_norm(normals, norm).mean(1)
        failed[part] = ~usable & ~images.misclassified
        offsets = images.overshoot.unsqueeze(1) - difference
        for wrong in (False, True):
            mine = (usable & (images.misclassified == wrong)).nonzero().squeeze(1)
            if not len(mine):
                continue
            base, w, b = images.x0[mine], normals[mine], offsets[mine]
            if wrong and mode == "fast":  # a lower bound: the farthest of the half-spaces alone
                estimate[part][mine] = distances(1 - base, base, w, b, norm)[0].amax(1)
            elif not wrong and rays:
                nearest, reachable = two_nearest(base, w, b, norm)
                boundaries.append(Nearest(*(value[reachable] for value in nearest)))
                kinds[part][mine] = torch.where(reachable, 1, 2)
            else:
                move = images.move(base, w, b, wrong)
                x[part][mine] = (base + move).clamp(0, 1)
                kinds[part][mine] = torch.where(move.abs().amax(1) > 0, 3 if wrong else 2, 0)
    images = Images.of(network, norm, x0, labels, torch.cat(logits0))
    crossings = Crossings(images)
    crossings.codes = torch.where(failed, status, crossings.codes)
    crossings.distance, crossings.steps = estimate, crossings.steps + 1
    ahead, straight, back = ((kinds == kind).nonzero().squeeze(1) for kind in (1, 2, 3))
    empty = Nearest(x0.new_zeros(0, 2, x0.shape[1]), x0.new_zeros(0, 2), x0.new_zeros(0, 2))
    nearest = Nearest(*(torch.cat(values) for values in zip(empty, *boundaries, strict=True)))
    return images, crossings, FirstStep(ahead, straight, back, x, nearest, steepness)


def _try_extra_candidates(
    images: Images,
    crossings: Crossings,
    rows: Tensor,
    x: Tensor,
    logits: Tensor,
    short: Tensor,
    steepness: Tensor,
    budget: SearchBudget,
) -> tuple[Tensor, Tensor]:
    """Take the first step of ``rows`` to one of the further rivals where that is shorter; return ``x`` and ``short``.

    The first step knows the strongest rivals. Where it ended (``x`` ``[b, D]``) all ``logits`` have been seen again, so
    how fast every boundary came nearer on the way is known too. What one came faster than those known do on average is
    added to their average steepness; where it would be nearer if it were `TUNED.steeper` times as steep as that, it and
    the next, ``extra_candidates`` in all, are linearized.
    """
    extra = min(budget.extra_candidates, logits.shape[1] - 1 - budget.candidates)
    if extra <= 0 or not len(rows):
        return x, short
    own = images.labels[rows].unsqueeze(1)
    known = strongest(images.logits0[rows], own, budget.candidates)
    gap, left = (f.gather(1, own) - f for f in (images.logits0[rows], logits))
    taken = images.length(x - images.x0[rows])
    speed = (gap - left) / taken.unsqueeze(1).clamp_min(1e-30)
    usual = speed.gather(1, known).mean(1, keepdim=True)
    steep = (steepness[rows].unsqueeze(1) + speed - usual).clamp_min(1e-30)
    reach = (gap / (TUNED.steeper * steep)).scatter(1, torch.cat([own, known], 1), torch.inf)
    reach, rivals = reach.topk(extra, dim=1, largest=False)
    asked = (reach[:, 0] < taken).nonzero().squeeze(1)
    x, moved = x.clone(), torch.zeros_like(rows, dtype=torch.bool)
    base = images.x0[rows[asked]]
    for part, _, difference, normals, usable in linearize(images, crossings, rows[asked], base, rivals[asked]):
        of = asked[part]
        move = images.move(base[part], normals, images.overshoot[rows[of]].unsqueeze(1) - difference, back=False)
        moved[of] = usable & (images.length(move) < taken[of])
        x[of] = torch.where(moved[of].unsqueeze(1), (base[part] + move).clamp(0, 1), x[of])
    again = moved.nonzero().squeeze(1)
    x[again], _, still = not_crossed(images, crossings, rows[again], x[again])
    return x, torch.cat([short[~moved[short]], again[still]])


def _confirm(images: Images, crossings: Crossings) -> None:
    """Re-check every crossing with the model itself; if it is not one, move it up to 5 % further."""
    rows = crossings.distance.isfinite().nonzero().squeeze(1)
    for factor in (1.0, 1.001, 1.01, 1.05):
        if not len(rows):
            return
        x = (images.x0[rows] + factor * (crossings.x[rows] - images.x0[rows])).clamp(0, 1)
        crossed = images.level(rows, images.network.exact(x)) > images.tolerance[rows]
        crossings.x[rows] = x
        crossings.distance[rows] = torch.where(crossed, images.length(x - images.x0[rows]), torch.inf)
        rows = rows[~crossed]


def parse_mode(text: str) -> Mode:
    """Return the mode called ``text``; a UsageError where there is none."""
    if text not in MODES:
        raise unknown("mode", text, MODES)
    return text


def parse_precision(text: str) -> Precision:
    """Return the precision called ``text``; a UsageError where there is none."""
    if text not in PRECISIONS:
        raise unknown("precision", text, PRECISIONS)
    return text
