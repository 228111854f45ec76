"""DeepFool's state and steps: onto the nearest linearized boundary, again and again (arXiv 1511.04599).

`Images` never changes during a search, `Crossings` holds the nearest point found for each image; everything else that
a stage reads or returns stands in its signature. ``rows`` ``[b]`` are the images a stage works on, ``x`` ``[b, D]``
their current points. A *level* is the logit difference by which a point lies beyond the boundary: positive where the
model gives another class than the label or, for a misclassified image, the label itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from puma.attacks import TUNED
from puma.attacks.halfspace import step_into_intersection, step_to_nearest
from puma.attacks.network import Network
from puma.margins import Status
from puma.threat import Norm

Linearized = tuple[slice, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Images:
    """Images and what the model says about them."""

    network: Network
    norm: Norm
    x0: Tensor  # float32 [B, D], the images
    labels: Tensor  # int64 [B]
    logits0: Tensor  # float32 [B, K], at the images
    misclassified: Tensor  # bool [B]
    overshoot: Tensor  # float32 [B], the level at which steps aim
    tolerance: Tensor  # float32 [B], the level from which a point counts as beyond the boundary

    @classmethod
    def of(cls, network: Network, norm: Norm, x0: Tensor, labels: Tensor, logits0: Tensor) -> Images:
        """Derive the thresholds from the logits at the images."""
        largest = logits0.abs().amax(1)
        scale = largest + largest.clamp(max=1)  # 1 + |f|, but in proportion where all logits are small
        misclassified = logits0.argmax(1) != labels
        tolerance = TUNED.tolerance * scale
        overshoot = TUNED.overshoot * _level(logits0, labels, misclassified).abs() + 10 * TUNED.tolerance * scale
        return cls(network, norm, x0, labels, logits0, misclassified, overshoot, tolerance)

    def level(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Return how far beyond the boundary logits ``[b, K]`` are."""
        return _level(logits, self.labels[rows], self.misclassified[rows])

    def length(self, difference: Tensor) -> Tensor:
        """Return the norm of differences ``[b, D]``."""
        return difference.abs().amax(1) if self.norm == "Linf" else difference.square().sum(1).sqrt()

    def move(self, base: Tensor, normals: Tensor, offsets: Tensor, back: bool) -> Tensor:
        """Return the displacement from ``base`` onto the nearest half-space or, ``back``, into all of them."""
        step = step_into_intersection if back else step_to_nearest
        return step(1 - base, base, normals, offsets, self.norm)


class Crossings:
    """The nearest point known beyond the boundary of each image.

    Attributes:
        x: ``[B, D]``, the point; the image itself where none is known.
        distance, level: ``[B]`` of that point; inf and 0 where none is known.
        codes: int8 ``[B]`` of `puma.margins.Status`.
        steps: int64 ``[B]``, linearizations.
    """

    def __init__(self, images: Images) -> None:
        self.x = images.x0.clone()
        self.distance = torch.full_like(images.tolerance, torch.inf)
        self.level = torch.zeros_like(images.tolerance)
        self.steps = torch.zeros_like(images.labels)
        status = torch.where(images.misclassified, int(Status.MISCLASSIFIED), int(Status.UNCONVERGED))
        self.codes = torch.where(images.logits0.isfinite().all(1), status, int(Status.NAN)).to(torch.int8)

    def update(self, images: Images, rows: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        """Keep those of ``x`` that are beyond the boundary and nearer than what was known; return the levels."""
        level = images.level(rows, logits)
        length = images.length(x - images.x0[rows])
        better = (level > images.tolerance[rows]) & (length < self.distance[rows])
        self.x[rows] = torch.where(better.unsqueeze(1), x, self.x[rows])
        self.distance[rows] = torch.where(better, length, self.distance[rows])
        self.level[rows] = torch.where(better, level, self.level[rows])
        return level

    def evaluate(self, images: Images, rows: Tensor, x: Tensor) -> Tensor:
        """As `update`, with a forward pass."""
        return self.update(images, rows, x, images.network.logits(x))


def linearize(
    images: Images, crossings: Crossings, rows: Tensor, x: Tensor, rivals: int | Tensor
) -> Iterator[Linearized]:
    """Linearize at ``x`` the boundaries to the ``rivals`` strongest other classes there, or to those of ``[b, m]``.

    Yields chunk by chunk the slice of the rows, the levels ``[b]``, ``f_up - f_down`` ``[b, m]``, its gradients
    ``[b, m, D]``, and whether these lead anywhere ``[b]``; a row's status says why they do not.
    """
    for part, logits, gradients in images.network.passes(x):
        at = rows[part]
        up, down = classes(images, at, logits, rivals if isinstance(rivals, int) else rivals[part])
        difference, normals, usable, status = checked(*gradients(up, down))
        if images.network.bf16:  # what bfloat16 takes for a crossing need not be one
            level = images.level(at, logits)
        else:
            level = crossings.update(images, at, x[part], logits)
        failed = ~images.misclassified[at] & crossings.distance[at].isinf() & ~usable
        crossings.codes[at] = torch.where(failed, status, crossings.codes[at])
        yield part, level, difference, normals, usable


def classes(images: Images, rows: Tensor, logits: Tensor, rivals: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes ``(up, down)`` ``[b, m]`` whose logit difference is to rise."""
    own = images.labels[rows].unsqueeze(1)
    rivals = strongest(logits, own, rivals) if isinstance(rivals, int) else rivals
    own, back = own.expand_as(rivals), images.misclassified[rows].unsqueeze(1)
    return torch.where(back, own, rivals), torch.where(back, rivals, own)


def checked(difference: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return differences and gradients (0 in rows too large for float32), which rows are usable, else their status."""
    largest = normals.abs().amax((1, 2))  # NaN where there is one
    smallest, most = TUNED.gradients
    finite = (largest < most) & (difference.abs().amax(1) < most)
    usable = finite & (largest > smallest)
    status = torch.where(finite, int(Status.NO_GRADIENT), int(Status.NAN)).to(torch.int8)
    normals = torch.where(finite.view(-1, 1, 1), normals, 0.0)
    return torch.where(finite.unsqueeze(1), difference, 0.0), normals, usable, status


def strongest(logits: Tensor, own: Tensor, count: int) -> Tensor:
    """Return the ``count`` classes ``[b, m]`` of the largest logits ``[b, K]`` besides ``own`` ``[b, 1]``."""
    return logits.scatter(1, own, -torch.inf).topk(min(count, logits.shape[1] - 1), dim=1).indices


def not_crossed(images: Images, crossings: Crossings, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the points ``x`` of ``rows``; where a step fell a little short, those a little farther out too.

    DeepFool stretches every step, by 2 % (arXiv 1511.04599, section 2); here it is as far as it has to be, and only
    then.

    Returns:
        The points ``[b, D]``, the logits there ``[b, K]``, and which of them (int64) are not beyond the boundary.
    """
    x = x.clone()
    logits, short = _forward(images, crossings, rows, x)
    at = rows[short]
    own = images.labels[at].unsqueeze(1)
    rival = strongest(logits[short], own, 1)
    gap, left = ((f.gather(1, own) - f.gather(1, rival)).squeeze(1) for f in (images.logits0[at], logits[short]))
    factor = (left + images.overshoot[at]) / (gap - left)
    near = (factor > 0) & (factor < TUNED.max_stretch) & ~images.misclassified[at]
    close, factor = short[near], factor[near].unsqueeze(1)
    x[close] = torch.lerp(images.x0[rows[close]], x[close], 1 + factor).clamp(0, 1)
    logits[close], still = _forward(images, crossings, rows[close], x[close])
    return x, logits, torch.cat([short[~near], close[still]])


def _forward(images: Images, crossings: Crossings, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate ``x``; return the logits and which of the rows are not beyond the boundary."""
    if not len(rows):
        return images.logits0[rows], rows
    logits = images.network.logits(x)
    level = crossings.update(images, rows, x, logits)
    broken = level.isnan()
    nan = torch.where(broken & ~images.misclassified[rows], int(Status.NAN), crossings.codes[rows])
    crossings.codes[rows] = nan.to(torch.int8)
    return logits, (~(broken | (level > images.tolerance[rows]))).nonzero().squeeze(1)


def deepfool_steps(
    images: Images, crossings: Crossings, rows: Tensor, x: Tensor, rivals: int, back: bool, steps: int
) -> None:
    """Step from ``x`` onto the nearest linearized boundary until it is crossed.

    Args:
        images: the images.
        crossings: updated with every crossing.
        rows: int64 ``[b]``, images not beyond the boundary at ``x``.
        x: ``[b, D]``.
        rivals: classes linearized at each step.
        back: whether all of these rows are misclassified, or none.
        steps: linearizations at most, the one at the image included.
    """
    for step in range(1, steps):
        if not len(rows):
            return
        following, alive = x.clone(), torch.zeros_like(rows, dtype=torch.bool)
        overshoot = images.overshoot[rows] * TUNED.growth ** min(max(0, step - 4), 12)
        for part, _, difference, normals, usable in linearize(images, crossings, rows, x, rivals):
            move = images.move(x[part], normals, overshoot[part].unsqueeze(1) - difference, back)
            following[part] = (x[part] + move).clamp(0, 1)
            alive[part] = usable & (move.abs().amax(1) > 0)  # in a corner of the box there is nowhere left to go
        crossings.steps[rows] += 1
        rows, x = rows[alive], following[alive]
        x, _, short = not_crossed(images, crossings, rows, x)
        rows, x = rows[short], x[short]


def _level(logits: Tensor, labels: Tensor, misclassified: Tensor) -> Tensor:
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    rival = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return torch.where(misclassified, own - rival, rival - own)
