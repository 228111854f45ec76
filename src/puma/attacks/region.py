"""The shortest way into several half-spaces at once, without leaving the box: back into the region of one's label.

A linear program in Linf and a quadratic one in L2, with as many unknowns as pixels but only a handful of constraints
besides the box. A primal-dual interior-point method solves a whole batch of them together: the pixels are eliminated by
hand, what is left is a system of one equation for each half-space (Mehrotra 1992, without the predictor).
"""

from __future__ import annotations

import torch
from torch import Tensor

from puma.attacks.halfspace import displacement, distances
from puma.threat import Norm

_ITERATIONS = 12
_CENTRING = 0.1
_SHRINK = 0.95
_SLACK = 1e-3
_GAP = 1e-3  # of the norm: closer to the optimum float32 runs out of digits


def intersection(room_up: Tensor, room_down: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    """A displacement ``[B, D]`` of nearly least norm that lies in all half-spaces ``[B, m, D]`` of its row.

    Where the farthest half-space alone already satisfies the others its step is exact. Where the box keeps a
    half-space out of reach the step goes as far towards the farthest as the box allows.

    Args:
        room_up: ``[B, D]``, how far each pixel may grow.
        room_down: ``[B, D]``, how far it may shrink.
        normals: ``[B, m, D]``.
        offsets: ``[B, m]``, the levels to reach.
        norm: ``"Linf"`` or ``"L2"``.
    """
    single, time = distances(room_up, room_down, normals, offsets, norm)
    blocked = single.isinf() & (normals.abs().amax(-1) > 0)
    time = torch.where(blocked, 1e30, time)
    farthest = torch.where(single.isinf(), torch.where(blocked, 1e30, -1.0), single).argmax(1)
    rows = torch.arange(len(normals), device=normals.device)
    step = displacement(room_up, room_down, normals[rows, farthest], time[rows, farthest], norm)
    short = (offsets - _reach(normals, step)) > 1e-6 + 1e-3 * offsets.abs()
    mixed = (short.any(1) & ~single.isinf().any(1)).nonzero().squeeze(1)
    if len(mixed):
        answer = _interior_point(
            room_up[mixed], room_down[mixed], normals[mixed], offsets[mixed], single[mixed].amax(1), norm
        )
        usable = answer.isfinite().all(1)
        step[mixed[usable]] = answer[usable]
    return step


def farthest(room_up: Tensor, room_down: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    """A lower bound ``[B]`` of the norm of `intersection`: the distance to the farthest of the half-spaces alone.

    Where the box keeps one out of reach it is inf.
    """
    single, _ = distances(room_up, room_down, normals, offsets, norm)
    return single.amax(1)


def _interior_point(
    room_up: Tensor, room_down: Tensor, normals: Tensor, offsets: Tensor, bound: Tensor, norm: Norm
) -> Tensor:
    """Solve the programs; ``bound`` ``[B]`` is a lower bound of the norm, the unit of length inside."""
    unit = bound.clamp_min(1e-30).unsqueeze(1)
    # Rows of W of the size that makes W d about 1 for |d| = 1; lengths in units of the bound.
    size = (normals.abs().sum(-1) if norm == "Linf" else normals.square().sum(-1).sqrt()).clamp_min(1e-30)
    w, b = normals / size.unsqueeze(-1), offsets / size / unit
    high, low = room_up / unit + _SLACK, room_down / unit + _SLACK  # slack: pixels at 0 or 1 need an interior too
    flat = norm == "Linf"
    d, t = torch.zeros_like(high), torch.full_like(unit, 2.0)
    s, z = torch.ones_like(b), torch.ones_like(b)
    start = 1.0 / (2 * d.shape[1]) if flat else 1.0
    up, down = start / high, start / low  # multipliers of the box
    over = under = torch.full_like(d, start) if flat else torch.zeros_like(d)  # ... and of |d| <= t
    for _ in range(_ITERATIONS):
        gaps = (high - d, low + d, t - d, t + d) if flat else (high - d, low + d)
        duals = (up, down, over, under) if flat else (up, down)
        pairs = 1.0 * b.shape[1] + len(gaps) * d.shape[1]
        product = (s * z).sum(1) + sum((gap * dual).sum(1) for gap, dual in zip(gaps, duals, strict=True))
        mu = (_CENTRING * product).clamp_min(_GAP).unsqueeze(1) / pairs
        ratios = [dual / gap for gap, dual in zip(gaps, duals, strict=True)]
        pulls = [mu / gap for gap in gaps]
        # Stationarity with every multiplier but those of the half-spaces replaced by its linearised pull.
        force = torch.einsum("bmd,bm->bd", w, z) - pulls[0] + pulls[1]
        diagonal = ratios[0] + ratios[1]
        if flat:
            force, diagonal = force - pulls[2] + pulls[3], diagonal + ratios[2] + ratios[3]
            arrow = ratios[3] - ratios[2]
            corner = (ratios[2] + ratios[3]).sum(1, keepdim=True)
            tension = -1.0 + (pulls[2] + pulls[3]).sum(1, keepdim=True)
        else:
            force, diagonal = force - d, diagonal + 1.0
        missing = _reach(w, d) - b - s
        # Eliminate the pixels: rows of U couple to the rest, first the half-spaces, then (Linf) the radius t.
        u = torch.cat([w, arrow.unsqueeze(1)], 1) if flat else w
        over_diagonal = u / diagonal.unsqueeze(1)
        system = torch.einsum("bid,bjd->bij", over_diagonal, u).double()
        right = torch.einsum("bid,bd->bi", over_diagonal, force).double()
        count = b.shape[1]
        lead = torch.zeros_like(system)
        lead[:, range(count), range(count)] = (s / z).double()
        target = torch.cat([-missing - s + mu / z, tension], 1) if flat else -missing - s + mu / z
        signs = torch.ones(u.shape[1], dtype=torch.float64, device=u.device)
        if flat:
            lead[:, count, count] = corner.squeeze(1).double()
            signs[count] = -1.0
        solution, _ = torch.linalg.solve_ex(system * signs + lead, target.double() - right)
        dz = solution[:, :count].float()
        dt = solution[:, count:].float() if flat else None
        dd = (force + torch.einsum("bmd,bm->bd", w, dz) - (arrow * dt if dt is not None else 0.0)) / diagonal
        ds = missing + _reach(w, dd)
        moves = (-dd, dd, dt - dd, dt + dd) if dt is not None else (-dd, dd)
        changes = [
            pull - dual - ratio * move for pull, dual, ratio, move in zip(pulls, duals, ratios, moves, strict=True)
        ]
        primal = torch.minimum(
            _room(s, ds), torch.stack([_room(g, m) for g, m in zip(gaps, moves, strict=True)]).amin(0)
        )
        dual = torch.minimum(
            _room(z, dz), torch.stack([_room(y, c) for y, c in zip(duals, changes, strict=True)]).amin(0)
        )
        if not flat:
            primal = dual = torch.minimum(primal, dual)
        d, s, z = d + primal * dd, s + primal * ds, z + dual * dz
        up, down = up + dual * changes[0], down + dual * changes[1]
        if dt is not None:
            t, over, under = t + primal * dt, over + dual * changes[2], under + dual * changes[3]
    step = d * unit
    return torch.maximum(torch.minimum(step, room_up), -room_down)


def _room(value: Tensor, change: Tensor) -> Tensor:
    """The largest step ``[B, 1]`` up to 1 that keeps ``value + step * change`` well above 0."""
    limit = torch.where(change < 0, -value / change, torch.inf).amin(1, keepdim=True)
    return (_SHRINK * limit).clamp(max=1.0)


def _reach(normals: Tensor, step: Tensor) -> Tensor:
    return torch.einsum("bmd,bd->bm", normals, step)
