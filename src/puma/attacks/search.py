"""The stages of DeepFool's search: steps onto linearized boundaries, rays rotated toward their normal, boundary steps.

`Images` never changes during a search, `Crossings` holds the nearest point found for each image. ``rows`` ``[b]`` are
the images a stage works on, ``x`` ``[b, D]`` their points. A *level* is the logit difference by which a point lies
beyond the boundary: positive where the model gives another class than the label or, for a misclassified image, the
label itself. A *ray* is a normal and a time: each pixel moves along the normal at its own speed until it is 0 or 1
(`displacement`), so each of its points is the least-norm point of some half-space. At the nearest boundary point its
normal is the boundary's own (or, in a fold, a mean of those that meet there).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from puma.attacks import TUNED
from puma.attacks import halfspace as planes
from puma.attacks.halfspace import TINY, UNBOUNDED, displacement, dual_norm
from puma.attacks.network import Network
from puma.margins import Status
from puma.threat import Norm


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
        return (planes.step_into_intersection if back else planes.step_to_nearest)(base, normals, offsets, self.norm)

    def classes(self, rows: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the classes ``(up, down)`` ``[b, count]`` whose logit difference is to rise."""
        own, back = self.labels[rows].unsqueeze(1), self.misclassified[rows].unsqueeze(1)
        rivals = strongest(logits, own, count)
        own = own.expand_as(rivals)
        return torch.where(back, own, rivals), torch.where(back, rivals, own)


class Crossings:
    """The nearest point known beyond the boundary of each image."""

    def __init__(self, images: Images) -> None:
        self.x = images.x0.clone()  # [B, D]; the image itself where none is known
        self.distance = torch.full_like(images.tolerance, torch.inf)  # [B]
        self.level = torch.zeros_like(images.tolerance)  # [B]
        self.steps = torch.zeros_like(images.labels)  # int64 [B], linearizations
        status = torch.where(images.misclassified, int(Status.MISCLASSIFIED), int(Status.UNCONVERGED))
        self.codes = torch.where(images.logits0.isfinite().all(1), status, int(Status.NAN)).to(torch.int8)

    def update(self, images: Images, rows: Tensor, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """Keep those of ``x`` (at which the model gives ``logits``) that are beyond and nearer; return the levels."""
        level = images.level(rows, images.network.logits(x) if logits is None else logits)
        length = images.length(x - images.x0[rows])
        better = (level > images.tolerance[rows]) & (length < self.distance[rows])
        self.x[rows] = torch.where(better.unsqueeze(1), x, self.x[rows])
        self.distance[rows] = torch.where(better, length, self.distance[rows])
        self.level[rows] = torch.where(better, level, self.level[rows])
        return level


def linearize(
    images: Images, crossings: Crossings, rows: Tensor, x: Tensor, rivals: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Linearize at ``x`` the boundaries to the ``rivals`` strongest other classes there.

    Yields by chunks: the slice of the rows, levels ``[b]``, ``f_up - f_down`` ``[b, m]``, its gradients ``[b, m, D]``,
    and whether these lead anywhere ``[b]``; a row's status says why they do not.
    """
    for part, logits, gradients in images.network.passes(x):
        at = rows[part]
        up, down = images.classes(at, logits, rivals)
        difference, normals, usable, status = checked(*gradients(up, down))
        if images.network.bf16:  # what bfloat16 takes for a crossing need not be one
            level = images.level(at, logits)
        else:
            level = crossings.update(images, at, x[part], logits)
        failed = ~images.misclassified[at] & crossings.distance[at].isinf() & ~usable
        crossings.codes[at] = torch.where(failed, status, crossings.codes[at])
        yield part, level, difference, normals, usable


def checked(difference: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return differences and gradients (0 in rows too large for float32), which rows are usable, else their status."""
    largest = normals.abs().amax((1, 2))  # NaN where there is one
    smallest, most = TUNED.gradients
    finite = (largest < most) & (difference.abs().amax(1) < most)
    status = torch.where(finite, int(Status.NO_GRADIENT), int(Status.NAN)).to(torch.int8)
    normals = torch.where(finite.view(-1, 1, 1), normals, 0.0)
    return torch.where(finite.unsqueeze(1), difference, 0.0), normals, finite & (largest > smallest), status


def strongest(logits: Tensor, own: Tensor, count: int) -> Tensor:
    """Return the ``count`` classes ``[b, m]`` of the largest logits ``[b, K]`` besides ``own`` ``[b, 1]``."""
    return logits.scatter(1, own, -torch.inf).topk(min(count, logits.shape[1] - 1), dim=1).indices


def _level(logits: Tensor, labels: Tensor, misclassified: Tensor) -> Tensor:
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    rival = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return torch.where(misclassified, own - rival, rival - own)


def not_crossed(images: Images, crossings: Crossings, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate the points ``x``; where a step fell a little short, those a little farther out too.

    DeepFool (arXiv 1511.04599, section 2) stretches every step by 2 %; here as far as needed, and only then. Returns
    the points ``[b, D]``, and which of them (int64) are not beyond the boundary.
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
    _, still = _forward(images, crossings, rows[close], x[close])
    return x, torch.cat([short[~near], close[still]])


def _forward(images: Images, crossings: Crossings, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if not len(rows):
        return images.logits0[rows], rows
    logits = images.network.logits(x)
    level = crossings.update(images, rows, x, logits)
    crossings.codes[rows[level.isnan() & ~images.misclassified[rows]]] = int(Status.NAN)
    return logits, (level <= images.tolerance[rows]).nonzero().squeeze(1)


def deepfool_steps(
    images: Images, crossings: Crossings, rows: Tensor, x: Tensor, rivals: int, back: bool, steps: int
) -> None:
    """Step from ``x``, not yet across, onto the nearest of ``rivals`` linearized boundaries until it is crossed.

    All of the rows are misclassified (``back``), or none. ``steps`` counts the linearization at the image too.
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
        x, short = not_crossed(images, crossings, rows, x)
        rows, x = rows[short], x[short]


class Ray(NamedTuple):
    """One ray for each row."""

    normal: Tensor  # [b, D], unit
    time: Tensor  # [b], of its next point
    rise: Tensor  # [b], the level difference from the image to the boundary
    slope: Tensor  # [b], its rate at the point


def two_nearest(base: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> tuple[Ray, Ray]:
    """The rays to the two nearest of the half-spaces ``normals . d >= offsets`` (the same where there is only one).

    A time is `UNBOUNDED` where the box keeps a half-space out of reach.
    """
    size = dual_norm(normals, norm)
    normals = normals / size.unsqueeze(-1)
    length, time = planes.distances(base, normals, offsets / size, norm)
    rows, time = torch.arange(len(base), device=base.device), torch.where(length.isinf(), UNBOUNDED, time)
    nearest = length.topk(min(2, length.shape[1]), dim=1, largest=False).indices[:, [0, -1]].T
    first, second = (Ray(normals[rows, of], time[rows, of], offsets[rows, of], offsets[rows, of]) for of in nearest)
    return first, second


def locate_crossing(images: Images, crossings: Crossings, rows: Tensor, first: Ray, second: Ray | None) -> Ray:
    """Evaluate the model where the nearest boundary should be, and the ``second`` where that may be the nearer one.

    What is found corrects the time (a secant).
    """

    def corrected(at: Tensor, ray: Ray) -> Tensor:
        base = images.x0[at]
        move = displacement(base, ray.normal, ray.time, images.norm)
        level = crossings.update(images, at, (base + move).clamp(0, 1))
        share = ray.rise / (ray.rise - images.overshoot[at] + level).clamp_min(TUNED.least_rise * ray.rise)
        return ray.time * share.nan_to_num(1.0).clamp(*TUNED.secant)

    normal, rise, time = first.normal.clone(), first.rise.clone(), corrected(rows, first)
    if second is not None:
        doubtful = (second.time < TUNED.second_boundary * time) & (second.normal != normal).any(1)
        other = Ray(*(part[doubtful] for part in second))
        if len(other.time):
            corrected_time = corrected(rows[doubtful], other)
            nearer = corrected_time < time[doubtful]
            of = doubtful.nonzero().squeeze(1)[nearer]
            time[of], rise[of], normal[of] = corrected_time[nearer], other.rise[nearer], other.normal[nearer]
    return Ray(normal, time, rise, rise / time.clamp_min(TINY))


def ray_points(images: Images, rows: Tensor, normal: Tensor, time: Tensor) -> Tensor:
    """Return the points ``[b, D]`` of rays at a time."""
    base = images.x0[rows]
    return (base + displacement(base, _speed(images, normal), time, "L2")).clamp(0, 1)


def _speed(images: Images, normal: Tensor) -> Tensor:
    """How fast the pixels ``[b, D]`` move: as the normal says, in Linf nearly all alike, except where facets that meet
    pull to either side, so that their mean is nearly 0: there the nearest point is one in between.
    """
    if images.norm == "L2":
        return normal
    return (normal / (TUNED.full_speed * normal.abs().mean(1, keepdim=True).clamp_min(TINY))).clamp(-1, 1)


def rotate(
    images: Images, crossings: Crossings, rows: Tensor, ray: Ray, shares: Sequence[float], tolerance: float
) -> Ray:
    """Rotate the rays toward the boundary's normal, one share after the other (one forward and one backward pass each).

    The linearization also predicts where the rotated ray crosses. Shrinking shares average the normals of facets. A ray
    is left alone when the boundary linearized at its point is at most the share ``tolerance`` nearer.
    """
    norm, (normals, times, rise, slopes) = images.norm, (part.clone() for part in ray)
    active = torch.arange(len(rows), device=rows.device)
    for share in shares:
        if not len(active):
            break
        at = rows[active]
        x = ray_points(images, at, normals[active], times[active])
        proceed = torch.zeros_like(active, dtype=torch.bool)
        for part, level, _, gradient, usable in linearize(images, crossings, at, x, 1):
            of, usable = active[part], usable & level.isfinite()
            normal, moved = gradient[:, 0], x[part] - images.x0[at[part]]
            size, covered = dual_norm(normal, norm), (normal * moved).sum(1)
            mixed = torch.lerp(normals[of], normal / size.unsqueeze(1), share)
            mixed = mixed / dual_norm(mixed, norm).unsqueeze(1)
            goal = covered - level + TUNED.ray_overshoot * images.overshoot[at[part]]
            time, slope = _meet(images, at[part], mixed, normal, goal, times[of])
            normals[of] = torch.where(usable.unsqueeze(1), mixed, normals[of])
            times[of], slopes[of] = torch.where(usable, time, times[of]), torch.where(usable, slope, slopes[of])
            proceed[part] = usable & (covered < (1 - tolerance) * size * images.length(moved))
        crossings.steps[at] += 1
        active = active[proceed]
    return Ray(normals, times, rise, slopes)


def _meet(
    images: Images, rows: Tensor, ray: Tensor, plane: Tensor, goal: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return when the rays reach the planes ``plane . d = goal``, and the slope there (Newton's method)."""
    base, speed = images.x0[rows], _speed(images, ray)
    climb, (earliest, latest) = plane * speed, TUNED.meet
    time, slope = before, torch.zeros_like(before)
    for _ in range(TUNED.ray_newton_steps):
        step = displacement(base, speed, time, "L2")
        slope = torch.where((step < 1 - base) & (step > -base), climb, 0.0).sum(1)
        time = time + torch.where(slope > 0, (goal - (plane * step).sum(1)) / slope.clamp_min(TINY), 0.0)
        time = torch.maximum(torch.minimum(time, latest * before), earliest * before)
    return time, slope


def trim(images: Images, crossings: Crossings, rows: Tensor, ray: Ray) -> Tensor:
    """Find where the rays cross: along the slope, then by secants. Return the last points tried ``[b, D]``."""
    times, aim = ray.time.clone(), TUNED.ray_overshoot * images.overshoot[rows]
    low, high = torch.zeros_like(times), torch.full_like(times, torch.inf)
    below, above = torch.zeros_like(times), torch.zeros_like(times)
    slopes = torch.maximum(ray.slope, TUNED.least_slope * ray.rise / times.clamp_min(TINY)).clamp_min(TINY)
    points, (factor, growth, most) = torch.empty_like(ray.normal), TUNED.outward
    of = torch.arange(len(rows), device=rows.device)
    for turn in range(TUNED.trims + TUNED.reaches):
        if not len(of):
            break
        time, slope = times[of], slopes[of]
        x = points[of] = ray_points(images, rows[of], ray.normal[of], time)
        level = crossings.update(images, rows[of], x)
        through = level > images.tolerance[rows[of]]
        high[of], above[of] = torch.where(through, time, high[of]), torch.where(through, level, above[of])
        low[of], below[of] = torch.where(through, low[of], time), torch.where(through, below[of], level)
        aim[of] = torch.where(through, aim[of], TUNED.raised_aim * aim[of])  # short again: aim farther
        goal, one_sided = aim[of], high[of].isinf()
        share = ((goal - below[of]) / (above[of] - below[of]).clamp_min(TINY)).clamp(*TUNED.bracket)
        inward = torch.maximum(time - (level - goal) / slope, TUNED.inward * time)
        outward = torch.minimum(time + factor * growth**turn * (goal - level) / slope, most * time)
        secant = low[of] + share * (high[of] - low[of])
        along = torch.where(one_sided, outward, inward)
        times[of] = torch.where(one_sided | (low[of] == 0), along, secant).nan_to_num(UNBOUNDED)
        if turn + 1 < TUNED.trims:
            of = of[(high[of] - times[of]).abs() > TUNED.trim_tolerance * times[of]]
        else:
            of = of[crossings.distance[rows[of]].isinf() & level.isfinite()]
    return points


def boundary_steps(images: Images, crossings: Crossings, rows: Tensor, rivals: int, rounds: int, back: bool) -> None:
    """Move the crossings of ``rows`` along the boundary toward their images; ``back``: all rows are misclassified.

    Each round linearizes the boundary at the point and goes part of the way to the image's projection onto it (for
    misclassified images, into the half-spaces of all rivals); where that falls short, the secant toward the nearest
    point known leads back. A row that gains nothing takes shorter strides, and is left alone in the end.
    """
    rows = rows[crossings.distance[rows].isfinite()] if rounds else rows[:0]
    x, strides = crossings.x[rows], torch.full_like(crossings.distance[rows], TUNED.stride)
    worth = 1 - (0 if back else TUNED.worth_a_step)
    (factor, constant), (longer, shorter) = TUNED.secant_factors, TUNED.stride_factors
    for _ in range(rounds):
        if not len(rows):
            return
        before, target = crossings.distance[rows], x.clone()
        promising = torch.zeros_like(rows, dtype=torch.bool)
        for part, _, difference, normals, usable in linearize(images, crossings, rows, x, rivals):
            base = images.x0[rows[part]]
            offsets = (TUNED.ray_overshoot * images.overshoot[rows[part]]).unsqueeze(1) - difference
            offsets = offsets + torch.einsum("bmd,bd->bm", normals, x[part] - base)
            move = images.move(base, normals, offsets, back)
            target[part] = torch.lerp(x[part], base + move, strides[part].unsqueeze(1)).clamp(0, 1)
            promising[part] = usable & (images.length(move) < worth * before[part])
        rows, x, strides, before = (values[promising] for values in (rows, target, strides, before))
        if not len(rows):
            return
        level = crossings.update(images, rows, x)
        share = (-level / (crossings.level[rows] - level).clamp_min(TINY)).clamp(0, 1)
        share = torch.where(level > images.tolerance[rows], 0.0, (share * factor + constant).clamp(max=1)).unsqueeze(1)
        x = x + share * (crossings.x[rows] - x)
        gained = crossings.distance[rows] < before * (1 - TUNED.least_gain)
        strides = torch.where(gained, (strides * longer).clamp(max=1), strides * shorter)
        proceed = strides > TUNED.least_stride
        rows, x, strides = rows[proceed], x[proceed], strides[proceed]
    if len(rows):
        crossings.update(images, rows, x)
