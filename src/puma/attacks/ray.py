"""From the image along a ray to the boundary, and which ray is the shortest.

A ray is given by a normal: every pixel walks along it at its own speed until it reaches 0 or 1 (`displacement`), so
each point of the ray is the least-norm point of some half-space with that normal. At the nearest point of a boundary
the ray's normal is the boundary's own (or, in a fold, a mean of those that meet there). So: look at the boundary where
the ray crosses it, tilt the ray towards the normal found there, predict from the same linearisation where the tilted
ray will cross, look again. Steps that shrink average the normals of facets between which a full step would go to and
fro. One pass forwards and backwards pays for a tilt; what is left to the crossing itself is found by secants, forwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puma.attacks.halfspace import displacement, distances, dual_length
from puma.attacks.search import FAR, Search

_RIVAL = 1.25  # the second boundary is looked at where its distance is less than this times the first's
_PAD = 0.1  # of the search's: a ray knows how to get across, so it aims closer to the boundary than DeepFool does
_FULL_SPEED = 0.1
"""In Linf a pixel walks at full speed from this share of the normal's mean on. Strictly every pixel does; but where the
averaged normal is nearly 0, facets pull to either side, and the nearest point is one in between."""
_NEWTON_STEPS = 3
_TRIMS, _REACHES = 2, 6
_NEAR = 1e-3  # a crossing is not trimmed by less than this share


class Rays:
    """One ray for each row of a search: unit normal ``[B, D]`` and time ``[B]`` of its next point.

    Args:
        search: the state; its ``x`` is kept at the rays' latest points.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.normal = torch.zeros_like(search.start)
        self.second = torch.zeros_like(search.start)
        self.time, self.slope, self.gap = (torch.zeros_like(search.distance) for _ in range(3))
        self.choice = self.time.new_zeros(len(self.time), 2, 2)
        """Time and gap of the two nearest linearised boundaries."""

    def offer(self, rows: Tensor, normals: Tensor, gaps: Tensor) -> Tensor:
        """Take the rays to the two nearest of the half-spaces ``normals . d >= gaps``, seen from the images ``rows``.

        Returns bool ``[b]``: rows that have a half-space within reach of the box.
        """
        base, norm = self.search.start[rows], self.search.norm
        size = dual_length(normals, norm)
        normals = normals / size.unsqueeze(-1)
        length, time = distances(1 - base, base, normals, gaps / size, norm)
        nearest = length.topk(min(2, length.shape[1]), dim=1, largest=False).indices
        picked = normals.gather(1, nearest.unsqueeze(-1).expand(-1, -1, base.shape[1]))
        self.normal[rows], self.second[rows] = picked[:, 0], picked[:, -1]
        time = torch.where(length.isinf(), FAR, time)
        self.choice[rows] = torch.stack([time.gather(1, nearest), gaps.gather(1, nearest)], -1)[:, [0, -1]]
        return length.isfinite().any(1)

    def point(self, rows: Tensor, normal: Tensor, time: Tensor) -> Tensor:
        """The points ``[b, D]`` of rays at a time."""
        base = self.search.start[rows]
        return (base + displacement(1 - base, base, self._speed(normal), time, "L2")).clamp(0, 1)

    def _speed(self, normal: Tensor) -> Tensor:
        """How fast the pixels ``[b, D]`` of rays walk: as the normal says, or in Linf nearly all alike."""
        if self.search.norm == "L2":
            return normal
        mean = normal.abs().mean(1, keepdim=True).clamp_min(1e-30)
        return (normal / (_FULL_SPEED * mean)).clamp(-1, 1)

    def probe(self, rows: Tensor, both: bool = True) -> None:
        """Walk to where the nearest boundary should be, and correct its time by what is found there (a secant).

        With ``both`` the second nearest is looked at as well where it may turn out to be the nearer one.
        """
        self.time[rows] = self._corrected(rows, self.normal[rows], 0)
        self.gap[rows] = self.choice[rows, 0, 1]
        if both:
            rows = rows[self.choice[rows, 1, 0] < _RIVAL * self.time[rows]]
            rows = rows[(self.second[rows] != self.normal[rows]).any(1)]
        if both and len(rows):
            time = self._corrected(rows, self.second[rows], 1)
            nearer = time < self.time[rows]
            self.time[rows] = torch.where(nearer, time, self.time[rows])
            self.gap[rows] = torch.where(nearer, self.choice[rows, 1, 1], self.gap[rows])
            self.normal[rows] = torch.where(nearer.unsqueeze(1), self.second[rows], self.normal[rows])

    def _corrected(self, rows: Tensor, normal: Tensor, which: int) -> Tensor:
        time, gap = self.choice[rows, which].unbind(-1)
        base, norm = self.search.start[rows], self.search.norm
        level = self.search.attempt(rows, (base + displacement(1 - base, base, normal, time, norm)).clamp(0, 1))
        share = gap / (gap - self.search.pad[rows] + level).clamp_min(0.3 * gap)
        return time * share.nan_to_num(1.0).clamp(0.4, 3.0)

    def lengths(self, rows: Tensor) -> Tensor:
        """How far the rays' points are from the images."""
        return self.search.length(self.point(rows, self.normal[rows], self.time[rows]) - self.search.start[rows])

    def tilt(self, rows: Tensor, shares: Sequence[float], settled: float) -> None:
        """Turn the rays ``share`` of the way towards the boundary's normal, round after round.

        A ray is settled when the boundary linearised at its point is at most the share ``settled`` nearer.
        """
        search, norm = self.search, self.search.norm
        self.slope[rows] = self.gap[rows] / self.time[rows].clamp_min(1e-30)
        for share in shares:
            if not len(rows):
                return
            x = self.point(rows, self.normal[rows], self.time[rows])
            open_ = torch.zeros_like(rows, dtype=torch.bool)
            for here, level, _, normals, found in search.planes(rows, x, 1):
                at, found = rows[here], found & level.isfinite()
                normal, gone = normals[:, 0], x[here] - search.start[at]
                size, covered = dual_length(normal, norm), (normal * gone).sum(1)
                mixed = torch.lerp(self.normal[at], normal / size.unsqueeze(1), share)
                mixed = mixed / dual_length(mixed, norm).unsqueeze(1)
                goal = covered - level + _PAD * search.pad[at]
                time, slope = self._meet(at, mixed, normal, goal)
                self.normal[at] = torch.where(found.unsqueeze(1), mixed, self.normal[at])
                self.time[at] = torch.where(found, time, self.time[at])
                self.slope[at] = torch.where(found, slope, self.slope[at])
                open_[here] = found & (covered < (1 - settled) * size * search.length(gone))
            search.steps[rows] += 1
            rows = rows[open_]

    def _meet(self, rows: Tensor, ray: Tensor, plane: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """When the rays reach the planes ``plane . d = goal``, and how fast they then climb."""
        base, before = self.search.start[rows], self.time[rows]
        up, down, speed = 1 - base, base, self._speed(ray)
        climb = plane * speed
        time, slope = before, torch.zeros_like(before)
        for _ in range(_NEWTON_STEPS):
            step = displacement(up, down, speed, time, "L2")
            slope = torch.where((step < up) & (step > -down), climb, 0.0).sum(1)
            time = time + torch.where(slope > 0, (goal - (plane * step).sum(1)) / slope.clamp_min(1e-30), 0.0)
            time = torch.maximum(torch.minimum(time, 2 * before), 0.4 * before)
        return time, slope

    def trim(self, rows: Tensor) -> None:
        """Find where the rays cross, forwards only: secants once both sides are known, until then along the slope."""
        search = self.search
        aim = _PAD * search.pad
        low, high = torch.zeros_like(self.time), torch.full_like(self.time, torch.inf)
        below, above = torch.zeros_like(low), torch.zeros_like(low)
        slope = torch.maximum(self.slope, 0.2 * self.gap / self.time.clamp_min(1e-30)).clamp_min(1e-30)
        for turn in range(_TRIMS + _REACHES):
            if not len(rows):
                return
            time = self.time[rows]
            search.x[rows] = self.point(rows, self.normal[rows], time)
            level = search.attempt(rows, search.x[rows])
            through = level > search.floor[rows]
            high[rows], above[rows] = torch.where(through, time, high[rows]), torch.where(through, level, above[rows])
            low[rows], below[rows] = torch.where(through, low[rows], time), torch.where(through, below[rows], level)
            aim[rows] = torch.where(through, aim[rows], 4 * aim[rows])  # short again: aim farther
            share = ((aim - below) / (above - below).clamp_min(1e-30))[rows].clamp(0.02, 0.98)
            inward = torch.maximum(time - (level - aim[rows]) / slope[rows], 0.7 * time)
            outward = torch.minimum(time + 1.1 * 1.6**turn * (aim[rows] - level) / slope[rows], 1.3 * time)
            secant = low[rows] + share * (high[rows] - low[rows])
            one_sided = torch.where(high[rows].isinf(), outward, inward)
            self.time[rows] = torch.where(high[rows].isinf() | (low[rows] == 0), one_sided, secant).nan_to_num(FAR)
            if turn + 1 < _TRIMS:
                rows = rows[(high[rows] - self.time[rows]).abs() > _NEAR * self.time[rows]]
            else:
                rows = rows[search.distance[rows].isinf() & level.isfinite()]
