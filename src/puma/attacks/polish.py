"""Misclassified images: from the first point found in the label's region to a nearer one.

Each round linearises the boundaries to many rivals where the row stands and goes part of the way to the image's
projection into all of them at once (`puma.attacks.region`). Where that falls short of the region the secant towards the
best point known leads back to it, and the next round looks there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puma.attacks.region import intersection
from puma.attacks.search import Search

_PAD = 0.1  # of the search's: the secant leads back across, so a round aims closer to the boundary
_STRIDE = 0.8
_LEAST_STRIDE = 0.2
_GAIN = 2e-3


def polish(search: Search, rows: Tensor, classes: int, rounds: int) -> None:
    """Bring the points found for misclassified ``rows`` nearer to their images.

    A row that gains nothing takes shorter steps, and is left alone when they become small.
    """
    rows = rows[search.distance[rows].isfinite()]
    if not rounds or not len(rows):
        return
    search.x[rows] = search.best[rows]
    stride = torch.full_like(search.distance, _STRIDE)
    for _ in range(rounds):
        before, x = search.distance[rows], search.x[rows]
        target = x.clone()
        for here, _, difference, normals, found in search.planes(rows, x, classes):
            at = rows[here]
            base = search.start[at]
            offsets = (_PAD * search.pad[at]).unsqueeze(1) - difference
            offsets = offsets + torch.einsum("bmd,bd->bm", normals, x[here] - base)
            goal = base + intersection(1 - base, base, normals, offsets, search.norm)
            there = torch.lerp(x[here], goal, stride[at].unsqueeze(1))
            target[here] = torch.where(found.unsqueeze(1), there, x[here]).clamp(0, 1)
        level = search.attempt(rows, target)
        share = (-level / (search.depth[rows] - level).clamp_min(1e-30)).clamp(0, 1)
        share = torch.where(level > search.floor[rows], 0.0, (share * 1.05 + 0.02).clamp(max=1)).unsqueeze(1)
        search.x[rows] = target + share * (search.best[rows] - target)
        gained = search.distance[rows] < before * (1 - _GAIN)
        stride[rows] = torch.where(gained, (stride[rows] * 1.3).clamp(max=1), stride[rows] * 0.6)
        rows = rows[stride[rows] > _LEAST_STRIDE]
        if not len(rows):
            return
    search.attempt(rows, search.x[rows])
