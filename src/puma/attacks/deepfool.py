"""DeepFool, batched: how far an image lies from the decision boundary (arXiv 1511.04599), signed, in Linf or L2.

Each step linearizes the boundaries between the label and a few candidate classes and goes the shortest way onto the
nearest one, staying in [0, 1]; the better modes rotate the ray from the image to the boundary until it is shortest
(`puma.attacks.search`). A misclassified image goes into the region of its label. ``docs/margins.md`` has a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from puma.attacks import TUNED
from puma.attacks import search as stages
from puma.attacks.halfspace import UNBOUNDED, distances
from puma.attacks.network import Network, as_batch, check_labels
from puma.attacks.search import Crossings, Images, Ray
from puma.errors import integer, unknown
from puma.margins import STATUS_NAMES, Status
from puma.models.checks import IT_DEPENDS, attack_mode, check_same, true_float32
from puma.threat import Norm, parse_norm

Mode = Literal["fast", "deepfool", "refined", "tight"]
MODES: tuple[Mode, ...] = get_args(Mode)
Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class SearchBudget:
    """The passes that a mode may spend on an image."""

    candidates: int  # classes linearized at the image
    rotations: tuple[float, ...] = ()  # shares of the way that a ray is rotated toward the boundary's normal
    tolerance: float = 0.0  # no further rotation where the boundary linearized is at most this share nearer
    boundary_steps: int = 0  # at most, where the boundary bends so that a ray's crossing is not near enough
    return_steps: int = 0  # boundary steps for a misclassified image


BUDGETS: dict[Mode, SearchBudget] = {
    "fast": SearchBudget(3),
    "deepfool": SearchBudget(4),
    "refined": SearchBudget(4, rotations=(0.7, 0.4, 0.3), tolerance=0.02, return_steps=1),
    "tight": SearchBudget(5, (0.7, 0.5, 0.4, 0.32, 0.26, 0.22, 0.2, 0.18), 0.01, boundary_steps=8, return_steps=4),
}


@dataclass(frozen=True)
class DeepFool:
    """Margins of a batch."""

    margin: Tensor  # float32 [B], signed distance in pixel units of [0, 1]; `puma.margins.Status` says what it means
    codes: Tensor  # int8 [B], of `puma.margins.Status`
    steps: Tensor  # int16 [B], linearizations spent before the boundary was crossed
    predicted: Tensor  # int64 [B], the model's class for the image
    adversarial: Tensor  # [B, ...], a point beyond the boundary (misclassified: of the label's region); else the image
    passes: tuple[int, int]  # images passed forwards and backwards through the model

    @property
    def status(self) -> NDArray[np.str_]:
        """Names of the statuses, str ``[B]``."""
        names: NDArray[np.str_] = np.array(STATUS_NAMES)[self.codes.cpu().numpy()]
        return names

    def __repr__(self) -> str:
        names = zip(*np.unique(self.status, return_counts=True), strict=True)
        return f"<DeepFool {len(self.margin):,} images: {', '.join(f'{count:,} {name}' for name, count in names)}>"


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
    """Measure how far each image lies from the decision boundary; the fields of `DeepFool` are what is returned.

    Args:
        model: maps float32 images ``[B, ...]`` in [0, 1] to logits ``[B, K]``; in eval mode. It is not changed.
        images, labels: float ``[B, ...]`` in [0, 1], computed with in float32; int ``[B]``.
        norm: ``"Linf"`` or ``"L2"``.
        mode: ``"fast"`` estimates; ``"deepfool"`` is the textbook's; ``"refined"`` finds a nearby point of the
            boundary, ``"tight"`` searches longer for a nearer one.
        steps: linearizations at most before an image counts as unconverged.
        chunk: images per pass through the model.
        precision: ``"bf16"`` computes gradients under bfloat16 autocast; crossings are always seen in float32.
        proxy: a faster stand-in during the search, such as ``torch.compile(model, dynamic=False)``, for batches of at
            most four sizes; every crossing is confirmed by ``model`` itself.

    Raises:
        UsageError: unknown norm, mode or precision; ``steps`` or ``chunk`` below 1.
        DataError: images or labels of the wrong type, shape or range.
        ModelError: training mode; as `puma.models.checks.check_first`; an answer that depends on the other images.
    """
    require_known(mode, precision)
    norm, steps, chunk = parse_norm(norm), integer("steps", steps, low=1), integer("chunk", chunk, low=1)
    with torch.inference_mode(False), torch.no_grad():
        images, labels = as_batch(images, labels)
        network = Network(model, tuple(images.shape[1:]), chunk, precision == "bf16", proxy)
        # a compiled model has to keep what a second backward pass through the same graph will need
        keeping = functorch_config.patch(donated_buffer=False)
        with true_float32(images.device.type), keeping, attack_mode(model):
            found, crossings = _search(network, images.flatten(1), labels, norm, mode, steps)
            if network.searcher is not model and mode != "fast":
                _confirm(found, crossings)
    distance, steps_spent = crossings.distance, crossings.steps.to(torch.int16)
    crossed = distance.isfinite() & ~found.misclassified & (crossings.codes != int(Status.ESTIMATED))
    codes = torch.where(crossed, int(Status.CROSSED), crossings.codes).to(torch.int8)
    margin = torch.where(found.misclassified, -distance, distance)
    margin[codes >= int(Status.UNCONVERGED)] = torch.nan
    given = found.logits0.argmax(1), crossings.x.view_as(images), (network.forwards, network.backwards)
    return DeepFool(margin, codes, steps_spent, *given)


def _search(
    network: Network, x0: Tensor, labels: Tensor, norm: Norm, mode: Mode, steps: int
) -> tuple[Images, Crossings]:
    budget = BUDGETS[mode]
    alone = network.check(x0) if len(x0) else x0.new_zeros(0, 1)
    if len(x0):
        check_labels(labels, alone.shape[1])
    if alone.shape[1] == 1:  # no image, or no other class
        images = Images.of(network, norm, x0, labels, network.logits(x0, exact=True) if len(x0) else x0.new_zeros(0, 2))
        return images, Crossings(images)
    images, crossings, kinds, points, rays = _first_step(network, x0, labels, norm, budget.candidates, mode)
    check_same(alone[:1], images.logits0[:1], f"{IT_DEPENDS}, or changes from call to call")
    ahead, straight, back = ((kinds == kind).nonzero().squeeze(1) for kind in (1, 2, 3))
    x, (nearest, second) = points[straight], (Ray(*(values[ahead] for values in ray)) for ray in rays)
    if len(ahead):
        ray = stages.locate_crossing(images, crossings, ahead, nearest, None if mode == "fast" else second)
        if mode == "fast":
            point = stages.ray_points(images, ahead, ray.normal, ray.time)
            crossings.distance[ahead] = images.length(point - x0[ahead])
            crossings.codes[ahead] = int(Status.ESTIMATED)
        else:
            ray = stages.rotate(images, crossings, ahead, ray, budget.rotations[: steps - 1], budget.tolerance)
            last = stages.trim(images, crossings, ahead, ray)
            stages.boundary_steps(images, crossings, ahead, 1, budget.boundary_steps, back=False)
            lost = crossings.distance[ahead].isinf()
            straight, x = torch.cat([straight, ahead[lost]]), torch.cat([x, last[lost]])
    if mode == "fast":
        crossings.x = x0.clone()  # a crossing met on the way is not what an estimate is about
        return images, crossings
    x, short = stages.not_crossed(images, crossings, straight, x)
    stages.deepfool_steps(images, crossings, straight[short], x[short], 1, back=False, steps=steps)
    x, short = stages.not_crossed(images, crossings, back, points[back])
    stages.deepfool_steps(images, crossings, back[short], x[short], budget.candidates, back=True, steps=steps)
    if network.bf16:  # close to a boundary coarse gradients lead nowhere: search again with exact ones
        network.bf16 = False
        lost = crossings.distance.isinf() & ((crossings.codes == int(Status.UNCONVERGED)) | images.misclassified)
        for wrong in (False, True):
            rows = (lost & (images.misclassified == wrong)).nonzero().squeeze(1)
            stages.deepfool_steps(images, crossings, rows, x0[rows], budget.candidates, back=wrong, steps=steps)
        network.bf16 = True
    stages.boundary_steps(images, crossings, back, 2 * budget.candidates + 1, budget.return_steps, back=True)
    return images, crossings


def _first_step(
    network: Network, x0: Tensor, labels: Tensor, norm: Norm, candidates: int, mode: Mode
) -> tuple[Images, Crossings, Tensor, Tensor, list[Ray]]:
    """Linearize once at the images; the same forward pass gives their logits.

    Returns also: kinds ``[B]`` (1: with a ray to follow, 2: correct and to take plain steps, as all in mode deepfool
    and those that the box keeps from every ray, 3: misclassified, 0: done with), points ``[B, D]`` a step on for kinds
    2 (deepfool) and 3, and the rays to the two nearest boundaries.
    """
    x, kinds = x0.clone(), torch.zeros_like(labels)
    status, estimate = torch.zeros_like(labels, dtype=torch.int8), x0.new_full((len(x0),), torch.inf)
    failed = torch.zeros_like(labels, dtype=torch.bool)
    logits0: list[Tensor] = []
    rays = [Ray(torch.zeros_like(x0), *x0.new_zeros(3, len(x0))) for _ in range(2)]
    for part, logits, gradients in network.passes(x0):
        known = network.proxy is None and not network.bf16
        logits0.append(logits if known else network.logits(x0[part], exact=True))
        images = Images.of(network, norm, x0[part], labels[part], logits0[-1])
        up, down = images.classes(torch.arange(len(logits), device=x0.device), logits, candidates)
        difference, normals, usable, status[part] = stages.checked(*gradients(up, down))
        failed[part] = ~usable & ~images.misclassified
        offsets = images.overshoot.unsqueeze(1) - difference
        for wrong in (False, True):
            mine = (usable & (images.misclassified == wrong)).nonzero().squeeze(1)
            if not len(mine):
                continue
            base, w, b = images.x0[mine], normals[mine], offsets[mine]
            if wrong and mode == "fast":  # a lower bound: the farthest of the half-spaces alone
                estimate[part][mine] = distances(base, w, b, norm)[0].amax(1)
            elif wrong or mode == "deepfool":
                move = images.move(base, w, b, wrong)
                x[part][mine] = (base + move).clamp(0, 1)
                kinds[part][mine] = torch.where(move.abs().amax(1) > 0, 3 if wrong else 2, 0)
            else:
                for ray, found in zip(rays, stages.two_nearest(base, w, b, norm), strict=True):
                    for values, value in zip(ray, found, strict=True):
                        values[part][mine] = value
                kinds[part][mine] = torch.where(rays[0].time[part][mine] < UNBOUNDED, 1, 2)
    images = Images.of(network, norm, x0, labels, torch.cat(logits0))
    crossings = Crossings(images)
    crossings.codes = torch.where(failed, status, crossings.codes)
    crossings.distance, crossings.steps = estimate, crossings.steps + 1
    return images, crossings, kinds, x, rays


def _confirm(images: Images, crossings: Crossings) -> None:
    """Evaluate crossings with the model itself; where it sees none, move up to 5 % further, and give up beyond that.

    All that a proxy saw; of those that the folded model saw, the ones so close to the boundary that rounding matters.
    """
    crossed = crossings.distance.isfinite()
    if images.network.proxy is None:
        crossed &= crossings.level < TUNED.doubtful * images.tolerance
    rows = crossed.nonzero().squeeze(1)
    for factor in (1.0, 1.001, 1.01, 1.05):
        if not len(rows):
            return
        x = (images.x0[rows] + factor * (crossings.x[rows] - images.x0[rows])).clamp(0, 1)
        crossed = images.level(rows, images.network.logits(x, exact=True)) > images.tolerance[rows]
        crossings.x[rows] = x
        crossings.distance[rows] = torch.where(crossed, images.length(x - images.x0[rows]), torch.inf)
        rows = rows[~crossed]
    crossings.x[rows] = images.x0[rows]


def require_known(mode: str, precision: str) -> None:
    """Refuse a mode or precision that does not exist with a UsageError."""
    for kind, name, known in (("mode", mode, MODES), ("precision", precision, PRECISIONS)):
        if name not in known:
            raise unknown(kind, name, known)
