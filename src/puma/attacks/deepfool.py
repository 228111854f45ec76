"""DeepFool, batched: how far an image lies from the decision boundary (arXiv 1511.04599), signed, in Linf or L2.

Each step linearises the boundaries between the label and a few candidate classes and goes the shortest way onto the
nearest one, staying in [0, 1]. A misclassified image goes the other way, into the region of its label, and its margin
is negative. ``docs/margins.md`` tells the story with a picture; `benchmarks/margins.py` measures it against its peers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.attacks.halfspace import displacement, distances
from puma.attacks.network import Network
from puma.attacks.region import intersection
from puma.errors import DataError, UsageError, unknown
from puma.margins import STATUS_NAMES, Status
from puma.norms import Norm, parse_norm

Mode = Literal["rank", "parity", "margin", "tight"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Effort:
    """What a mode spends.

    Args:
        candidates: classes linearised at the first step.
        follow: classes linearised at each later step.
        polishes: projections of the image onto the boundary linearised where it was crossed.
        damping: share of the way to that projection that a polish goes.
    """

    candidates: int
    follow: int
    polishes: int
    damping: float = 1.0


EFFORTS: dict[Mode, Effort] = {
    "rank": Effort(candidates=3, follow=0, polishes=0),
    "parity": Effort(candidates=4, follow=1, polishes=0),
    "margin": Effort(candidates=4, follow=1, polishes=3, damping=0.7),
    "tight": Effort(candidates=5, follow=2, polishes=16, damping=0.7),
}

# The level beyond the boundary at which a step aims, as a share of the first logit gap: without it DeepFool stalls on
# ties; in logits rather than in pixels it costs every image the same share of its margin.
_PAD = 0.005
# A level counts as beyond the boundary from here on, as a share of the logits' size: float32 passes of the same image
# in another batch or memory format differ by less.
_FLOOR = 1e-6
# Polishing knows how to get back across, so it aims closer to the boundary than the first approach does.
_POLISH_PAD = 0.1
_LEAST_STRIDE = 0.2


@dataclass(frozen=True)
class DeepFool:
    """Margins of a batch.

    Args:
        margin: float32 ``[B]``, signed distance in pixel units of [0, 1]; see `puma.margins.Status` for its meaning.
        codes: int8 ``[B]``, codes of `puma.margins.Status`.
        steps: int16 ``[B]``, linearisations spent before the boundary was crossed.
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
    mode: Mode = "margin",
    steps: int = 50,
    chunk: int = 64,
) -> DeepFool:
    """Measure the margins of ``images``.

    Args:
        model: maps float images in [0, 1] to logits ``[B, K]``; in eval mode. It is not changed, nor are its gradients.
        images: float32 ``[B, ...]`` in [0, 1].
        labels: int64 ``[B]``.
        norm: ``"Linf"`` or ``"L2"``.
        mode: ``"rank"`` estimates from one linearisation; ``"parity"`` is plain DeepFool; ``"margin"`` polishes its
            crossing; ``"tight"`` polishes longer.
        steps: linearisations at most before an image counts as unconverged.
        chunk: images per pass through the model.

    Raises:
        UsageError: unknown norm or mode.
        DataError: images outside [0, 1] or not float32, labels that do not fit.
        ModelError: the model is in training mode or does not return logits.
    """
    parse_norm(norm)
    parse_mode(mode)
    if steps < 1 or chunk < 1:
        raise UsageError(f"steps and chunk have to be positive, not {steps} and {chunk}")
    check_images(images, labels)
    network = Network(model, tuple(images.shape[1:]), chunk)
    with torch.no_grad():
        search = _Search(network, images.detach().flatten(1), labels.to(images.device), norm, EFFORTS[mode])
        search.begin()
        if mode == "rank":
            search.estimate()
        else:
            for rows, follow, boundary in search.groups():
                search.approach(rows, follow, steps)
                search.polish(rows, boundary)
    return search.result(images)


def parse_mode(text: str) -> Mode:
    """Return the mode called ``text``.

    Raises:
        UsageError: there is none.
    """
    if text not in MODES:
        raise unknown("mode", text, MODES)
    return text


def check_images(images: Tensor, labels: Tensor) -> None:
    """Refuse images and labels that cannot be scored.

    Raises:
        DataError: as told in `deepfool`.
    """
    if images.dtype != torch.float32:
        raise DataError(
            f"images are {images.dtype}", why="margins are measured in float32", fix="images.float() / 255?"
        )
    if images.ndim < 2:
        raise DataError(f"images have shape {list(images.shape)}", why="[B, ...] is needed: a batch of images")
    if len(images) and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = float(images.min()), float(images.max())
        raise DataError(
            f"images reach from {low:g} to {high:g}", why="pixels have to lie in [0, 1]", fix="divide by 255?"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise DataError(
            f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images", why="[B] int is needed"
        )


class _Search:
    """The state of a batch on its way to the boundary. All vectors are ``[B]``, all images flattened ``[B, D]``."""

    def __init__(self, network: Network, start: Tensor, labels: Tensor, norm: Norm, effort: Effort) -> None:
        self.network, self.start, self.labels, self.norm, self.effort = network, start, labels.long(), norm, effort
        self.classes = network.logits(start[:1]).shape[1] if len(start) else 1
        if len(start) and not (int(labels.min()) >= 0 and int(labels.max()) < self.classes):
            raise DataError(
                f"labels reach from {int(labels.min())} to {int(labels.max())}",
                why=f"the model has {self.classes} classes",
            )
        self.predicted, self.steps = torch.zeros_like(self.labels), torch.zeros_like(self.labels)
        self.wrong = torch.zeros_like(self.labels, dtype=torch.bool)
        self.codes = torch.full_like(self.labels, int(Status.UNCONVERGED), dtype=torch.int8)
        self.best = start.clone()
        self.distance = start.new_full((len(start),), torch.inf)
        self.pad, self.floor, self.depth = (torch.zeros_like(self.distance) for _ in range(3))
        self.x, self.length = start.clone(), start.new_full((len(start),), torch.inf)
        self.alive = torch.zeros_like(self.wrong)

    def begin(self) -> None:
        """The first step: what the model says of the images, and one linearisation from the same pass."""
        if not len(self.start):
            return
        everything = torch.arange(len(self.start), device=self.start.device)
        if self.classes == 1:
            self._look(everything, self.network.logits(self.start))
            return
        for here, found, move, length in self._steps(everything, self.start, self.effort.candidates, 0):
            self.x[here] += move
            self.length[here] = torch.where(found, length, torch.inf)
            self.alive[here] = found & (move.abs().amax(1) > 0)
        self.steps += 1
        self.x.clamp_(0, 1)

    def _look(self, rows: Tensor, logits: Tensor) -> None:
        """Note the model's answer to the images ``rows``."""
        self.predicted[rows] = logits.argmax(1)
        self.wrong[rows] = self.predicted[rows] != self.labels[rows]
        scale = 1 + logits.abs().amax(1)
        self.floor[rows] = _FLOOR * scale
        if self.classes > 1:
            self.pad[rows] = _PAD * self._level(logits, rows).abs() + 10 * _FLOOR * scale
        status = torch.where(self.wrong[rows], int(Status.MISCLASSIFIED), int(Status.UNCONVERGED))
        self.codes[rows] = torch.where(logits.isfinite().all(1), status, int(Status.NAN)).to(torch.int8)

    def estimate(self) -> None:
        """The distance to the boundary linearised at the image; nothing is crossed."""
        good = self.length.isfinite() & (self.length > 0)
        self.distance[good] = self.length[good]
        estimated = good & ~self.wrong
        self.codes[estimated] = int(Status.ESTIMATED)

    def groups(self) -> list[tuple[Tensor, int, int]]:
        """The rows that leave their label's region and those that return to it.

        With each the number of classes linearised on the way and at the boundary. Leaving, the nearest boundary
        decides, and it is among the first few. Returning, every rival has to be beaten at once.
        """
        rows = self.alive.nonzero().squeeze(1)
        wrong = self.wrong[rows]
        follow, all_near = self.effort.follow, self.effort.candidates
        return [(rows[~wrong], follow, 1), (rows[wrong], all_near, 2 * all_near + 1)]

    def approach(self, rows: Tensor, follow: int, steps: int) -> None:
        """DeepFool from where the first step led ``rows`` to beyond the boundary."""
        x = self.x
        for step in range(1, steps + 1):
            rows = rows[~self._keep(rows, x[rows])] if len(rows) else rows
            if not len(rows) or step == steps:
                return
            alive = torch.zeros_like(rows, dtype=torch.bool)
            for here, found, move, _ in self._steps(rows, x[rows], follow, step):
                x[rows[here]] += move
                alive[here] = found & (move.abs().amax(1) > 0)  # in a corner of the box there is nowhere left to go
            self.steps[rows] += 1
            rows = rows[alive]
            x[rows] = x[rows].clamp(0, 1)

    def polish(self, rows: Tensor, classes: int) -> None:
        """Walk along the boundary to where it is nearest.

        Each round linearises where the row stands and goes part of the way to the image's projection onto that plane.
        Where that falls short of the boundary the secant towards the best crossing leads back to it, and the next round
        looks there. A row that gains nothing takes shorter steps, and is left alone when they become small.
        """
        rows = rows[self.distance[rows].isfinite()]
        if not self.effort.polishes or not len(rows):
            return
        self.x[rows] = self.best[rows]
        stride = torch.full_like(self.distance, self.effort.damping)
        pad, self.pad = self.pad, self.pad * _POLISH_PAD
        for _ in range(self.effort.polishes):
            before, x = self.distance[rows], self.x[rows]
            target = x.clone()
            for here, found, move, _ in self._steps(rows, x, classes, 1, home=True):
                goal = self.start[rows[here]] + move
                there = x[here] + stride[rows[here]].unsqueeze(1) * (goal - x[here])
                target[here] = torch.where(found.unsqueeze(1), there, x[here]).clamp(0, 1)
            level = self._try(rows, target)
            share = (-level / (self.depth[rows] - level).clamp_min(1e-30)).clamp(0, 1)
            share = torch.where(level > self.floor[rows], 0.0, (share * 1.05 + 0.02).clamp(max=1)).unsqueeze(1)
            self.x[rows] = target + share * (self.best[rows] - target)
            gained = self.distance[rows] < before * (1 - 2e-3)
            stride[rows] = torch.where(gained, (stride[rows] * 1.3).clamp(max=1), stride[rows] * 0.6)
            rows = rows[stride[rows] > _LEAST_STRIDE]
            if not len(rows):
                break
        if len(rows):
            self._try(rows, self.x[rows])
        self.pad = pad

    def result(self, images: Tensor) -> DeepFool:
        """Confirm every crossing with the model itself, and put the signs and statuses in place."""
        found = self.distance.isfinite()
        crossed = found & ~self.wrong & (self.codes != int(Status.ESTIMATED))
        self.codes[crossed] = int(Status.CROSSED)
        margin = torch.where(self.wrong, -self.distance, self.distance)
        margin[self.codes >= int(Status.UNCONVERGED)] = torch.nan
        return DeepFool(
            margin=margin,
            codes=self.codes,
            steps=self.steps.to(torch.int16),
            predicted=self.predicted,
            adversarial=self.best.view_as(images),
            passes=(self.network.forwards, self.network.backwards),
        )

    def _level(self, logits: Tensor, rows: Tensor | slice) -> Tensor:
        """How far beyond the boundary logits ``[b, K]`` are: > 0 on the far side, where the search wants to be."""
        labels = self.labels[rows].unsqueeze(1)
        own = logits.gather(1, labels).squeeze(1)
        rival = logits.scatter(1, labels, -torch.inf).amax(1)
        return torch.where(self.wrong[rows], own - rival, rival - own)

    def _try(self, rows: Tensor, x: Tensor) -> Tensor:
        """Look at ``x`` and keep what is beyond the boundary and closer than before; return the levels."""
        return self._note(rows, x, self.network.logits(x))

    def _note(self, rows: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        """As `_try`, with the logits ``[b, K]`` at hand."""
        level = self._level(logits, rows)
        length = self._length(x - self.start[rows])
        better = (level > self.floor[rows]) & (length < self.distance[rows])
        good = rows[better]
        self.best[good], self.distance[good], self.depth[good] = x[better], length[better], level[better]
        return level

    def _keep(self, rows: Tensor, x: Tensor) -> Tensor:
        """As `_try`, during the approach: bool ``[b]``, which rows are through; rows that end in NaN are dropped."""
        level = self._try(rows, x)
        self.codes[rows[level.isnan() & ~self.wrong[rows]]] = int(Status.NAN)
        return (level > self.floor[rows]) | level.isnan()

    def _length(self, difference: Tensor) -> Tensor:
        return difference.abs().amax(1) if self.norm == "Linf" else difference.square().sum(1).sqrt()

    def _steps(
        self, rows: Tensor, x: Tensor, classes: int, step: int, home: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield chunk by chunk ``(slice, found, move, length)``: the shortest way onto the linearised boundary.

        From ``x``, or with ``home`` from the image itself. A row is not found if no gradient leads anywhere; its status
        says why.
        """
        count = min(classes, self.classes - 1)

        def choose(here: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            if step == 0:
                self._look(rows[here], logits)
            if home:
                self._note(rows[here], x[here], logits)
            own = self.labels[rows[here]].unsqueeze(1)
            rivals = logits.scatter(1, own, -torch.inf).topk(count, dim=1).indices
            own = own.expand_as(rivals)
            back = self.wrong[rows[here]].unsqueeze(1)
            return torch.where(back, own, rivals), torch.where(back, rivals, own)

        for here, _, difference, normals, _ in self.network.linearise(x, choose):
            base = self.start[rows[here]] if home else x[here]
            pad = self.pad[rows[here]] * 1.5 ** min(max(0, step - 4), 12)
            offsets = pad.unsqueeze(1) - difference
            if home:
                offsets = offsets + torch.einsum("bmd,bd->bm", normals, x[here] - base)
            healthy = normals.isfinite().flatten(1).all(1) & offsets.isfinite().all(1)
            steep = normals.abs().amax((1, 2)) > 0
            at = rows[here]
            wrong = self.wrong[at]
            unsettled = ~wrong & self.distance[at].isinf()
            self.codes[at[~healthy & unsettled]] = int(Status.NAN)
            self.codes[at[healthy & ~steep & unsettled]] = int(Status.NO_GRADIENT)
            found = healthy & steep
            normals = torch.where(healthy.view(-1, 1, 1), normals, 0.0)
            move, length = self._shortest(base, normals, torch.where(healthy.unsqueeze(1), offsets, 0.0), wrong)
            yield here, found, move, length

    def _shortest(self, base: Tensor, normals: Tensor, offsets: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """Onto the nearest half-space, or for misclassified images into all of them."""
        up, down = 1 - base, base
        length, time = distances(up, down, normals, offsets, self.norm)
        # Out of reach in the box: go there anyway, as far as the box allows, and look again.
        reachable = torch.where(length.isinf() & (normals.abs().amax(-1) > 0), 1e30, length)
        nearest = reachable.argmin(1, keepdim=True)
        pick = nearest.unsqueeze(-1).expand(-1, -1, base.shape[1])
        time = torch.where(length.isinf(), 1e30, time).gather(1, nearest).squeeze(1)
        move = displacement(up, down, normals.gather(1, pick).squeeze(1), time, self.norm)
        length = length.gather(1, nearest).squeeze(1)
        if bool(wrong.any()):
            move[wrong] = intersection(up[wrong], down[wrong], normals[wrong], offsets[wrong], self.norm)
            length[wrong] = self._length(move[wrong])
        return move, length
