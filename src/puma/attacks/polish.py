"""From a point beyond the boundary to a nearer one: a walk along the boundary.

Each round linearises the boundary where the row stands and goes part of the way to the image's projection onto it; for
misclassified images that is the projection into the half-spaces of many rivals at once (`puma.attacks.region`). Where
that falls short of the boundary the secant towards the best point known leads back to it, and the next round looks
there. Unlike a ray in Linf (`puma.attacks.ray`) a walk may end with every pixel at a distance of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puma.attacks.search import Search

_PAD = 0.1  # of the search's: the secant leads back across, so a round aims closer to the boundary
_STRIDE = 0.8
_LEAST_STRIDE = 0.2
_GAIN = 2e-3  # a round has gained something from this share of the distance on
_WORTH = 0.05  # where a ray has come close already, the linearised boundary has to promise this much to go on


def polish(search: Search, rows: Tensor, classes: int, rounds: int, back: bool) -> None:
    """Bring the points found for ``rows`` nearer to their images; ``back``: all of these rows are misclassified.

    A row that gains nothing takes shorter steps, and is left alone when they become small.
    """
    rows = rows[search.distance[rows].isfinite()]
    if not rounds or not len(rows):
        return
    search.x[rows] = search.best[rows]
    stride = torch.full_like(search.distance, _STRIDE)
    for _ in range(rounds):
        before, x = search.distance[rows], search.x[rows]
        target, worth = x.clone(), torch.zeros_like(rows, dtype=torch.bool)
        for here, _, difference, normals, found in search.planes(rows, x, classes):
            at = rows[here]
            base = search.start[at]
            offsets = (_PAD * search.pad[at]).unsqueeze(1) - difference
            offsets = offsets + torch.einsum("bmd,bd->bm", normals, x[here] - base)
            move = search.shortest(base, normals, offsets, back)
            target[here] = torch.lerp(x[here], base + move, stride[at].unsqueeze(1)).clamp(0, 1)
            worth[here] = found & (search.length(move) < (1 - (0 if back else _WORTH)) * before[here])
        rows, target, before = rows[worth], target[worth], before[worth]
        if not len(rows):
            return
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
