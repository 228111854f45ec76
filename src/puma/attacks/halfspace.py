"""Least-norm steps inside the box [0, 1]: onto a half-space, the nearest of several, and into an intersection.

A linearized class boundary is the half-space ``w . d >= b`` of displacements ``d`` of an image ``x``. Pixels that reach
0 or 1 stop there and the others go further. Only negative margins (misclassified images, which have to beat every rival
class at once) need `step_into_intersection` and its interior-point method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puma.attacks import TUNED
from puma.threat import Norm

UNBOUNDED = 1e30  # a time by which every pixel has reached 0 or 1
TINY = 1e-30


def distances(x: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the least norm of a displacement in each half-space, and the time that `displacement` takes to get there.

    Images ``x`` are ``[B, D]``, ``normals`` ``[B, m, D]``, ``offsets`` (``b``), norm and time ``[B, m]``. The norm is 0
    where ``b <= 0``, inf where the box keeps the half-space out of reach or the normal is zero.
    """
    weight = normals.abs()
    slack = torch.where(normals > 0, (1 - x).unsqueeze(1), x.unsqueeze(1))  # [B, m, D], to the box
    if norm == "Linf":
        length = time = _times(weight, None, slack, offsets)
    else:
        time = _times(weight, weight, slack, offsets)
        step = torch.minimum(time.unsqueeze(-1) * weight, slack)
        length = torch.where(weight > 0, step, torch.zeros_like(step)).square().sum(-1).sqrt()
    reach = (weight * slack).sum(-1)
    unreachable = (offsets > 0) & ((reach < offsets) | (reach <= 0))
    return torch.where(unreachable, torch.inf, torch.where(offsets > 0, length, 0.0)), time


def displacement(x: Tensor, normal: Tensor, time: Tensor, norm: Norm) -> Tensor:
    """Return the displacement ``[B, D]`` of ``x`` along ``normal`` ``[B, D]`` at ``time`` ``[B]``, inside the box."""
    speed = normal if norm == "L2" else normal.sign()
    return torch.maximum(torch.minimum(speed * time.unsqueeze(1), 1 - x), -x)


def dual_norm(normals: Tensor, norm: Norm) -> Tensor:
    """Return the norm of normals ``[..., D]`` by which a logit gap is divided to give a distance."""
    return (normals.abs().sum(-1) if norm == "Linf" else normals.square().sum(-1).sqrt()).clamp_min(TINY)


def step_to_nearest(x: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    """The displacement ``[B, D]`` onto each row's nearest half-space; if the box keeps all away, towards the first."""
    if x.device.type != "cpu" or normals.shape[1] == 1:
        return _step_to_nearest_of_all(x, normals, offsets, norm)
    # The box only makes ways longer: mostly the half-space that is nearest without it is the only one to measure.
    least = offsets.clamp_min(0) / dual_norm(normals, norm)
    first = least.argmin(1, keepdim=True)
    normal = normals.take_along_dim(first.unsqueeze(-1), 1)
    length, time = distances(x, normal, offsets.take_along_dim(first, 1), norm)
    step = displacement(x, normal[:, 0], time[:, 0], norm)
    several = (length.isinf()[:, 0] | ((least < length).sum(1) > 1)).nonzero().squeeze(1)
    step[several] = _step_to_nearest_of_all(x[several], normals[several], offsets[several], norm)
    return step


def _step_to_nearest_of_all(x: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    length, time = distances(x, normals, offsets, norm)
    nearest = torch.where(length.isinf() & (normals.abs().amax(-1) > 0), UNBOUNDED, length).argmin(1)
    rows = torch.arange(len(x), device=x.device)
    return displacement(x, normals[rows, nearest], torch.where(length.isinf(), UNBOUNDED, time)[rows, nearest], norm)


def step_into_intersection(x: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    """A displacement ``[B, D]`` of nearly least norm into all half-spaces ``[B, m, D]`` of its row that are in reach.

    Exact where the farthest one's own step satisfies the others.
    """
    single, time = distances(x, normals, offsets, norm)
    blocked = single.isinf() & (normals.abs().amax(-1) > 0)
    farthest = torch.where(single.isinf(), torch.where(blocked, UNBOUNDED, -1.0), single).argmax(1)
    rows = torch.arange(len(x), device=x.device)
    time = torch.where(blocked, UNBOUNDED, time)[rows, farthest]
    step = displacement(x, normals[rows, farthest], time, norm)
    missed = (offsets - torch.einsum("bmd,bd->bm", normals, step)) > 1e-6 + 1e-3 * offsets.abs()
    several = (missed.any(1) & ~single.isinf().any(1)).nonzero().squeeze(1)
    if len(several):
        solved = _interior_point(x[several], normals[several], offsets[several], single[several].amax(1), norm)
        usable = solved.isfinite().all(1)
        step[several[usable]] = solved[usable]
    return step


def _times(weight: Tensor, speed: Tensor | None, slack: Tensor, offsets: Tensor) -> Tensor:
    """Solve ``sum |w| min(t * speed, slack) = b`` for t ``[B, m]``, by Newton's method.

    The left side is concave and increasing: Newton never passes the root, and is exact once the pixels at the box are.
    """
    power = weight if speed is None else weight * speed
    tiny = torch.finfo(weight.dtype).tiny
    time = offsets.clamp_min(0) / power.sum(-1).clamp_min(tiny)
    saturation = slack if speed is None else slack / speed.clamp_min(tiny)
    saturation = torch.where(weight > 0, saturation, torch.full_like(saturation, torch.inf))
    gained = weight * slack
    for _ in range(TUNED.newton_steps):
        stopped = saturation < time.unsqueeze(-1)
        blocked = torch.where(stopped, gained, torch.zeros_like(gained)).sum(-1)
        free = torch.where(stopped, torch.zeros_like(power), power).sum(-1)
        better = (offsets - blocked) / free.clamp_min(tiny)
        before, time = time, torch.maximum(time, torch.where(free > 0, better, time)).clamp(max=UNBOUNDED)
        if time.device.type == "cpu" and torch.equal(before, time):  # on a GPU looking would cost more than going on
            break
    return time


def _interior_point(x: Tensor, normals: Tensor, offsets: Tensor, bound: Tensor, norm: Norm) -> Tensor:
    """Minimize the norm of ``d`` subject to ``W d >= b`` and the box; ``bound`` ``[B]`` is a lower bound of it.

    A linear program in Linf (minimize ``t`` with ``|d_i| <= t``), a quadratic one in L2, by the primal-dual method of
    Boyd and Vandenberghe, Convex Optimization, section 11.7: Newton steps (11.54) for the modified conditions (11.53),
    1/t there = ``mu``, a tenth of the mean product of slacks and multipliers (11.59). With the multipliers of box and
    ``|d_i| <= t`` substituted each pixel's row is diagonal: m (Linf: m + 1) equations are left.
    """
    linf, count = norm == "Linf", offsets.shape[1]
    unit = bound.clamp_min(TINY).unsqueeze(1)
    size = dual_norm(normals, norm)
    w, b = normals / size.unsqueeze(-1), offsets / size / unit
    d, t = torch.zeros_like(x), torch.full_like(unit, 2.0)
    s, z = torch.ones_like(b), torch.ones_like(b)  # slacks of W d >= b, and their multipliers
    # The other constraints are limit + sign * d >= 0: the box, and in Linf -t <= d <= t.
    box = [(1 - x) / unit + TUNED.box_slack, x / unit + TUNED.box_slack]
    signs = (-1, 1, -1, 1) if linf else (-1, 1)
    start = 1.0 / (2 * d.shape[1]) if linf else 1.0
    duals = [start / limit for limit in box] + ([torch.full_like(d, start)] * 2 if linf else [])
    for _ in range(TUNED.iterations):
        gaps = [limit + sign * d for limit, sign in zip([*box, t, t], signs, strict=False)]
        product = (s * z).sum(1) + sum((gap * dual).sum(1) for gap, dual in zip(gaps, duals, strict=True))
        mu = (TUNED.centering * product).clamp_min(TUNED.gap).unsqueeze(1) / (1.0 * count + len(gaps) * d.shape[1])
        ratios = [dual / gap for gap, dual in zip(gaps, duals, strict=True)]
        pulls = [mu / gap for gap in gaps]
        force = torch.einsum("bmd,bm->bd", w, z)  # what pulls at d and is not of dz, dd or dt
        for sign, pull in zip(signs, pulls, strict=True):
            force = force + sign * pull
        diagonal = ratios[0] + ratios[1]
        missing = torch.einsum("bmd,bd->bm", w, d) - b - s
        target = -missing - s + mu / z
        u, negated = w, torch.ones(count + linf, dtype=torch.float64, device=w.device)
        lead = w.new_zeros(len(w), count + linf, count + linf, dtype=torch.float64)
        lead[:, range(count), range(count)] = (s / z).double()
        if linf:
            diagonal = diagonal + ratios[2] + ratios[3]
            arrow = ratios[3] - ratios[2]
            u = torch.cat([w, arrow.unsqueeze(1)], 1)
            target = torch.cat([target, -1.0 + (pulls[2] + pulls[3]).sum(1, keepdim=True)], 1)
            lead[:, count, count] = (ratios[2] + ratios[3]).sum(1).double()
            negated[count] = -1.0
        else:
            force, diagonal = force - d, diagonal + 1.0
        over_diagonal = u / diagonal.unsqueeze(1)
        system = torch.einsum("bid,bjd->bij", over_diagonal, u).double() * negated + lead
        right = target.double() - torch.einsum("bid,bd->bi", over_diagonal, force).double()
        solution = torch.linalg.solve_ex(system, right)[0].float()
        dz, dt = solution[:, :count], solution[:, count:]
        dd = (force + torch.einsum("bmd,bm->bd", w, dz) - (arrow * dt if linf else 0.0)) / diagonal
        ds = missing + torch.einsum("bmd,bd->bm", w, dd)
        moves = [sign * dd if j < 2 else dt + sign * dd for j, sign in enumerate(signs)]
        changes = [p - dual - r * move for p, dual, r, move in zip(pulls, duals, ratios, moves, strict=True)]
        primal, dual = _stride([s, *gaps], [ds, *moves]), _stride([z, *duals], [dz, *changes])
        if not linf:
            primal = dual = torch.minimum(primal, dual)
        d, s, z = d + primal * dd, s + primal * ds, z + dual * dz
        t = t + primal * dt if linf else t
        duals = [value + dual * change for value, change in zip(duals, changes, strict=True)]
    return torch.maximum(torch.minimum(d * unit, 1 - x), -x)


def _stride(values: list[Tensor], changes: list[Tensor]) -> Tensor:
    """Return the largest step ``[B, 1]`` up to 1 that keeps all ``value + step * change`` well above 0."""
    pairs = zip(values, changes, strict=True)
    limits = [torch.where(change < 0, -value / change, torch.inf).amin(1, keepdim=True) for value, change in pairs]
    return (TUNED.to_the_boundary * torch.stack(limits).amin(0)).clamp(max=1.0)
