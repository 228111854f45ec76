"""The shortest way onto a half-space without leaving the box [0, 1].

Everything DeepFool does between two looks at the network is here: a linearised class boundary is the half-space
``w . d >= b`` of displacements ``d``, and the step is its point of least Linf or L2 norm that keeps the pixels in
[0, 1]. The step is exact: pixels that reach the box stop there and the others go further, instead of clipping
afterwards. Rows are independent of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puma.threat import Norm

_NEWTON_STEPS = 6


def distances(
    room_up: Tensor, room_down: Tensor, normals: Tensor, offsets: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """The least norm of a displacement in each half-space.

    Args:
        room_up: ``[B, D]``, how far each pixel may grow (1 - x).
        room_down: ``[B, D]``, how far it may shrink (x).
        normals: ``[B, m, D]``.
        offsets: ``[B, m]``, the level ``b`` to reach.
        norm: ``"Linf"`` or ``"L2"``.

    Returns:
        The norm ``[B, m]`` (0 where ``b <= 0``, inf where the box keeps the half-space out of reach or the normal is
        zero), and the time ``[B, m]`` that `displacement` takes: every pixel walks from 0 at its own speed (1 in Linf,
        ``|w|`` in L2) until the time is over or its room is.
    """
    weight = normals.abs()
    room = torch.where(normals > 0, room_up.unsqueeze(1), room_down.unsqueeze(1))  # [B, m, D]
    speed = None if norm == "Linf" else weight
    time = _times(weight, speed, room, offsets)
    step = torch.minimum(time.unsqueeze(-1) if speed is None else time.unsqueeze(-1) * speed, room)
    step = torch.where(weight > 0, step, torch.zeros_like(step)) if norm == "L2" else step
    length = time if norm == "Linf" else step.square().sum(-1).sqrt()
    reach = (weight * room).sum(-1)
    unreachable = (offsets > 0) & ((reach < offsets) | (reach <= 0))
    return torch.where(unreachable, torch.inf, torch.where(offsets > 0, length, 0.0)), time


def displacement(room_up: Tensor, room_down: Tensor, normal: Tensor, time: Tensor, norm: Norm) -> Tensor:
    """The displacement ``[B, D]`` that walks along ``normal`` ``[B, D]`` for ``time`` ``[B]`` inside the box."""
    speed = normal if norm == "L2" else normal.sign()
    wanted = speed * time.unsqueeze(1)
    return torch.maximum(torch.minimum(wanted, room_up), -room_down)


def dual_length(normals: Tensor, norm: Norm) -> Tensor:
    """The norm of normals ``[..., D]`` by which a gap is divided to give a distance."""
    size = normals.abs().sum(-1) if norm == "Linf" else normals.square().sum(-1).sqrt()
    return size.clamp_min(1e-30)


def _times(weight: Tensor, speed: Tensor | None, room: Tensor, offsets: Tensor) -> Tensor:
    """Solve ``sum |w| min(t * speed, room) = b`` for t ``[B, m]``, by Newton's method.

    The left side is concave and increasing in t, so Newton from t = 0 climbs towards the root and never passes it; it
    is exact as soon as the set of pixels that hit the box is the final one.
    """
    power = weight if speed is None else weight * speed
    total = power.sum(-1)
    time = offsets.clamp_min(0) / total.clamp_min(torch.finfo(weight.dtype).tiny)
    saturation = room if speed is None else room / speed.clamp_min(torch.finfo(weight.dtype).tiny)
    saturation = torch.where(weight > 0, saturation, torch.full_like(saturation, torch.inf))
    gained = weight * room
    for _ in range(_NEWTON_STEPS):
        stopped = saturation < time.unsqueeze(-1)
        blocked = torch.where(stopped, gained, torch.zeros_like(gained)).sum(-1)
        free = torch.where(stopped, torch.zeros_like(power), power).sum(-1)
        better = (offsets - blocked) / free.clamp_min(torch.finfo(weight.dtype).tiny)
        before, time = time, torch.maximum(time, torch.where(free > 0, better, time)).clamp(max=1e30)
        if time.device.type == "cpu" and torch.equal(before, time):  # on a GPU looking would cost more than going on
            break
    return time
