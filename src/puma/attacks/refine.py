"""Nearer boundary points than DeepFool's: rays rotated toward the boundary's normal, then steps along the boundary.

A ray is a normal and a time: every pixel moves along the normal at its own speed until it reaches 0 or 1
(`displacement`), so each point of a ray is the least-norm point of some half-space. At the nearest boundary point the
ray's normal is the boundary's own (or, in a fold, a mean of those that meet there). So: linearize where the ray meets
the boundary, rotate the ray toward the normal found there, predict from the same linearization where the rotated ray
will cross, repeat. Shrinking shares average the normals of facets between which a full rotation would go to and fro.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puma.attacks import TUNED
from puma.attacks.halfspace import UNBOUNDED, displacement, distances, dual_norm
from puma.attacks.search import Crossings, Images, linearize
from puma.threat import Norm


class Ray(NamedTuple):
    """One ray for each row: unit normal ``[b, D]``, and the time of its next point ``[b]``.

    ``rise`` ``[b]`` is the level difference from the image to the boundary, ``slope`` ``[b]`` its rate at the point.
    """

    normal: Tensor
    time: Tensor
    rise: Tensor
    slope: Tensor


class Nearest(NamedTuple):
    """The two nearest linearized boundaries: unit normals ``[b, 2, D]``, times and level differences ``[b, 2]``."""

    normals: Tensor
    times: Tensor
    rises: Tensor


def two_nearest(base: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> tuple[Nearest, Tensor]:
    """Choose the two nearest of the half-spaces ``normals . d >= offsets``, seen from the images ``base`` ``[b, D]``.

    Returns:
        The two (one twice where there is only one), and bool ``[b]``: whether the box lets any half-space be reached.
    """
    size = dual_norm(normals, norm)
    normals = normals / size.unsqueeze(-1)
    length, time = distances(1 - base, base, normals, offsets / size, norm)
    nearest = length.topk(min(2, length.shape[1]), dim=1, largest=False).indices[:, [0, -1]]
    time = torch.where(length.isinf(), UNBOUNDED, time)
    picked = normals.gather(1, nearest.unsqueeze(-1).expand(-1, -1, base.shape[1]))
    return Nearest(picked, time.gather(1, nearest), offsets.gather(1, nearest)), length.isfinite().any(1)


def locate_crossing(images: Images, crossings: Crossings, rows: Tensor, nearest: Nearest, both: bool = True) -> Ray:
    """Evaluate the model where the nearest boundary should be and correct the time by what is found (a secant).

    With ``both`` the second nearest is evaluated as well where it may turn out to be the nearer one.
    """

    def corrected(of: Tensor, which: int) -> Tensor:
        at, time, rise = rows[of], nearest.times[of, which], nearest.rises[of, which]
        base = images.x0[at]
        move = displacement(1 - base, base, nearest.normals[of, which], time, images.norm)
        level = crossings.evaluate(images, at, (base + move).clamp(0, 1))
        share = rise / (rise - images.overshoot[at] + level).clamp_min(TUNED.least_rise * rise)
        return time * share.nan_to_num(1.0).clamp(*TUNED.secant)

    time = corrected(torch.arange(len(rows), device=rows.device), 0)
    normal, rise = nearest.normals[:, 0].clone(), nearest.rises[:, 0].clone()
    if both:
        doubtful = (nearest.times[:, 1] < TUNED.second_boundary * time).nonzero().squeeze(1)
        doubtful = doubtful[(nearest.normals[doubtful, 1] != normal[doubtful]).any(1)]
        if len(doubtful):
            second = corrected(doubtful, 1)
            nearer = second < time[doubtful]
            of = doubtful[nearer]
            time[of], rise[of], normal[of] = second[nearer], nearest.rises[of, 1], nearest.normals[of, 1]
    return Ray(normal, time, rise, rise / time.clamp_min(1e-30))


def ray_points(images: Images, rows: Tensor, normal: Tensor, time: Tensor) -> Tensor:
    """Return the points ``[b, D]`` of rays at a time."""
    base = images.x0[rows]
    return (base + displacement(1 - base, base, _speed(images, normal), time, "L2")).clamp(0, 1)


def _speed(images: Images, normal: Tensor) -> Tensor:
    """Return how fast the pixels ``[b, D]`` move: as the normal says, or in Linf nearly all alike.

    Strictly every pixel moves at full speed in Linf. But where the averaged normal is nearly 0 facets pull to either
    side, and the nearest point is one in between.
    """
    if images.norm == "L2":
        return normal
    mean = normal.abs().mean(1, keepdim=True).clamp_min(1e-30)
    return (normal / (TUNED.full_speed * mean)).clamp(-1, 1)


def rotate(
    images: Images, crossings: Crossings, rows: Tensor, ray: Ray, shares: Sequence[float], tolerance: float
) -> Ray:
    """Rotate the rays toward the boundary's normal, one share after the other (one forward and one backward pass each).

    A ray is left alone when the boundary linearized at its point is at most the share ``tolerance`` nearer.
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
            times[of] = torch.where(usable, time, times[of])
            slopes[of] = torch.where(usable, slope, slopes[of])
            proceed[part] = usable & (covered < (1 - tolerance) * size * images.length(moved))
        crossings.steps[at] += 1
        active = active[proceed]
    return Ray(normals, times, rise, slopes)


def _meet(
    images: Images, rows: Tensor, ray: Tensor, plane: Tensor, goal: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Return when the rays reach the planes ``plane . d = goal``, and the slope there (Newton's method)."""
    down = images.x0[rows]
    up, speed = 1 - down, _speed(images, ray)
    climb, (earliest, latest) = plane * speed, TUNED.meet
    time, slope = before, torch.zeros_like(before)
    for _ in range(TUNED.ray_newton_steps):
        step = displacement(up, down, speed, time, "L2")
        slope = torch.where((step < up) & (step > -down), climb, 0.0).sum(1)
        time = time + torch.where(slope > 0, (goal - (plane * step).sum(1)) / slope.clamp_min(1e-30), 0.0)
        time = torch.maximum(torch.minimum(time, latest * before), earliest * before)
    return time, slope


def trim(images: Images, crossings: Crossings, rows: Tensor, ray: Ray) -> Tensor:
    """Find where the rays cross, by forward passes: secants once both sides are known, until then along the slope.

    Returns:
        The last point tried for each row, ``[b, D]``.
    """
    times, aim = ray.time.clone(), TUNED.ray_overshoot * images.overshoot[rows]
    low, high = torch.zeros_like(times), torch.full_like(times, torch.inf)
    below, above = torch.zeros_like(times), torch.zeros_like(times)
    slopes = torch.maximum(ray.slope, TUNED.least_slope * ray.rise / times.clamp_min(1e-30)).clamp_min(1e-30)
    points, (factor, growth, most) = torch.empty_like(ray.normal), TUNED.outward
    of = torch.arange(len(rows), device=rows.device)
    for turn in range(TUNED.trims + TUNED.reaches):
        if not len(of):
            break
        time, slope = times[of], slopes[of]
        x = points[of] = ray_points(images, rows[of], ray.normal[of], time)
        level = crossings.evaluate(images, rows[of], x)
        through = level > images.tolerance[rows[of]]
        high[of], above[of] = torch.where(through, time, high[of]), torch.where(through, level, above[of])
        low[of], below[of] = torch.where(through, low[of], time), torch.where(through, below[of], level)
        aim[of] = torch.where(through, aim[of], TUNED.raised_aim * aim[of])  # short again: aim farther
        goal, one_sided = aim[of], high[of].isinf()
        share = ((goal - below[of]) / (above[of] - below[of]).clamp_min(1e-30)).clamp(*TUNED.bracket)
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

    Each round linearizes the boundary at the point and goes part of the way to the image's projection onto it; for
    misclassified images that is the projection into the half-spaces of many rivals at once. Where that falls short of
    the boundary, the secant toward the nearest point known leads back to it. Unlike a ray in Linf the result may have a
    distance of its own for every pixel. A row that gains nothing takes shorter strides, and is left alone in the end.
    """
    rows = rows[crossings.distance[rows].isfinite()]
    x, strides = crossings.x[rows], torch.full_like(crossings.distance[rows], TUNED.stride)
    if not rounds or not len(rows):
        return
    worth, (factor, constant), (longer, shorter) = (
        1 - (0 if back else TUNED.worth_a_step),
        TUNED.secant_factors,
        TUNED.stride_factors,
    )
    for _ in range(rounds):
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
        level = crossings.evaluate(images, rows, x)
        share = (-level / (crossings.level[rows] - level).clamp_min(1e-30)).clamp(0, 1)
        share = torch.where(level > images.tolerance[rows], 0.0, (share * factor + constant).clamp(max=1)).unsqueeze(1)
        x = x + share * (crossings.x[rows] - x)
        gained = crossings.distance[rows] < before * (1 - TUNED.least_gain)
        strides = torch.where(gained, (strides * longer).clamp(max=1), strides * shorter)
        proceed = strides > TUNED.least_stride
        rows, x, strides = rows[proceed], x[proceed], strides[proceed]
        if not len(rows):
            return
    crossings.evaluate(images, rows, x)
