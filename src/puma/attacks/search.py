"""The state of a batch on its way to the boundary, and plain DeepFool: step after step onto the linearised boundary.

Rows that leave their label's region make for the nearest boundary. Rows that return to it (misclassified images) have
to beat every rival at once: `puma.attacks.region`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from puma.attacks.halfspace import displacement, distances, dual_length
from puma.attacks.network import Network
from puma.attacks.region import intersection
from puma.errors import DataError
from puma.margins import Status
from puma.threat import Norm

Planes = tuple[slice, Tensor, Tensor, Tensor, Tensor]

# The level beyond the boundary at which a step aims, as a share of the first logit gap: without it DeepFool stalls on
# ties; in logits rather than in pixels it costs every image the same share of its margin.
_PAD = 0.005
# A level counts as beyond the boundary from here on, as a share of the logits' size: float32 passes of the same image
# in another batch or memory format differ by less.
_FLOOR = 1e-6
# How much steeper than estimated a boundary may be that has not been linearised.
_STEEPER = 1.4
# A step that falls short is stretched where less than this share of the way should do.
_STRETCH = 0.04
FAR = 1e30
"""A time at which every pixel has reached the end of its room."""


class Search:
    """What is known of each image. All vectors are ``[B]``, all images flattened ``[B, D]``.

    Args:
        network: the margin model.
        start: the images.
        labels: int64.
        norm: ``"Linf"`` or ``"L2"``.

    Raises:
        DataError: a label that the model has no class for.
    """

    def __init__(self, network: Network, start: Tensor, labels: Tensor, norm: Norm) -> None:
        self.network, self.start, self.labels, self.norm = network, start, labels.long(), norm
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
        self.x = start.clone()
        self.answer, self.latest = start.new_zeros(2, len(start), self.classes)
        """Logits at the image and at the latest ``x`` looked at."""
        self.steepness = torch.zeros_like(self.distance)
        """Of the boundaries linearised at the image, on average."""

    def look(self, rows: Tensor, logits: Tensor) -> None:
        """Note the model's answer to the images ``rows`` themselves."""
        self.answer[rows] = logits
        self.predicted[rows] = logits.argmax(1)
        self.wrong[rows] = self.predicted[rows] != self.labels[rows]
        scale = 1 + logits.abs().amax(1)
        self.floor[rows] = _FLOOR * scale
        if self.classes > 1:
            self.pad[rows] = _PAD * self.level(rows, logits).abs() + 10 * _FLOOR * scale
        status = torch.where(self.wrong[rows], int(Status.MISCLASSIFIED), int(Status.UNCONVERGED))
        self.codes[rows] = torch.where(logits.isfinite().all(1), status, int(Status.NAN)).to(torch.int8)

    def level(self, rows: Tensor, logits: Tensor) -> Tensor:
        """How far beyond the boundary logits ``[b, K]`` are: > 0 on the far side, where the search wants to be."""
        labels = self.labels[rows].unsqueeze(1)
        own = logits.gather(1, labels).squeeze(1)
        rival = logits.scatter(1, labels, -torch.inf).amax(1)
        return torch.where(self.wrong[rows], own - rival, rival - own)

    def note(self, rows: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        """Keep those of ``x`` that are beyond the boundary and closer than what was known; return the levels."""
        level = self.level(rows, logits)
        length = self.length(x - self.start[rows])
        better = (level > self.floor[rows]) & (length < self.distance[rows])
        self.best[rows] = torch.where(better.unsqueeze(1), x, self.best[rows])
        self.distance[rows] = torch.where(better, length, self.distance[rows])
        self.depth[rows] = torch.where(better, level, self.depth[rows])
        return level

    def attempt(self, rows: Tensor, x: Tensor) -> Tensor:
        """As `note`, with a pass through the model."""
        return self.note(rows, x, self.network.logits(x))

    def length(self, difference: Tensor) -> Tensor:
        """Norm of differences ``[b, D]``."""
        return difference.abs().amax(1) if self.norm == "Linf" else difference.square().sum(1).sqrt()

    def planes(self, rows: Tensor, x: Tensor, classes: int | Tensor, first: bool = False) -> Iterator[Planes]:
        """Linearise at ``x`` the boundaries to ``classes``: the so many strongest rivals there, or those of ``[b, m]``.

        Yields chunk by chunk the slice of the rows, the levels ``[b]``, ``f_up - f_down`` ``[b, m]``, its gradients
        ``[b, m, D]``, and whether they lead anywhere ``[b]``; the status of a row says why they do not.
        """

        def choose(here: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            if first:
                self.look(rows[here], self.network.exact(x[here], logits))
            own = self.labels[rows[here]].unsqueeze(1)
            rivals = classes[here] if isinstance(classes, Tensor) else self.strongest(own, logits, classes)
            own = own.expand_as(rivals)
            back = self.wrong[rows[here]].unsqueeze(1)
            return torch.where(back, own, rivals), torch.where(back, rivals, own)

        for here, logits, difference, normals in self.network.linearise(x, choose):
            at = rows[here]
            seen = not first and not self.network.coarse  # what bfloat16 takes for a crossing need not be one
            level = self.note(at, x[here], logits) if seen else self.level(at, logits)
            healthy = normals.isfinite().flatten(1).all(1) & difference.isfinite().all(1)
            found = healthy & (normals.abs().amax((1, 2)) > 0)
            unsettled = ~self.wrong[at] & self.distance[at].isinf()
            blame = torch.where(healthy, int(Status.NO_GRADIENT), int(Status.NAN)).to(torch.int8)
            self.codes[at] = torch.where(unsettled & ~found, blame, self.codes[at])
            normals = torch.where(healthy.view(-1, 1, 1), normals, 0.0)
            if first:
                self.steepness[at] = dual_length(normals, self.norm).mean(1)
            yield here, level, torch.where(healthy.unsqueeze(1), difference, 0.0), normals, found

    def strongest(self, own: Tensor, logits: Tensor, count: int) -> Tensor:
        """The ``count`` classes ``[b, m]`` of the largest logits ``[b, K]`` besides ``own`` ``[b, 1]``."""
        return logits.scatter(1, own, -torch.inf).topk(min(count, self.classes - 1), dim=1).indices

    def short(self, rows: Tensor) -> Tensor:
        """Look at ``x``; return those of the rows that fell short of the boundary.

        Where a step falls short by little it is stretched. DeepFool stretches every step, by 2 % (arXiv 1511.04599,
        section 2); here it is as far as it has to be, and only then.
        """
        rows = self._look(rows)
        own = self.labels[rows].unsqueeze(1)
        rival = self.strongest(own, self.latest[rows], 1)
        gap, left = (
            (to.gather(1, own) - to.gather(1, rival)).squeeze(1) for to in (self.answer[rows], self.latest[rows])
        )
        stretch = (left + self.pad[rows]) / (gap - left)
        near = (stretch > 0) & (stretch < _STRETCH) & ~self.wrong[rows]
        picked = near.nonzero().squeeze(1)
        close, stretch = rows[picked], stretch[picked].unsqueeze(1)
        self.x[close] = torch.lerp(self.start[close], self.x[close], 1 + stretch).clamp(0, 1)
        return torch.cat([rows[~near], self._look(close)])

    def _look(self, rows: Tensor) -> Tensor:
        """Note the model's answer at ``x``; return the rows that are not beyond the boundary there."""
        if not len(rows):
            return rows
        self.latest[rows] = self.network.logits(self.x[rows])
        level = self.note(rows, self.x[rows], self.latest[rows])
        broken = level.isnan()
        self.codes[rows] = torch.where(broken & ~self.wrong[rows], int(Status.NAN), self.codes[rows]).to(torch.int8)
        return rows[~(broken | (level > self.floor[rows]))]

    def reconsider(self, rows: Tensor, short: Tensor, sure: int, doubtful: int) -> Tensor:
        """Take the first step of ``rows`` to one of the further rivals where that is shorter; return who is short then.

        The first step knows the ``sure`` strongest rivals. Where it ended all logits have been seen again, so how fast
        every boundary came nearer on the way is known too. What one came faster than those known do on average is added
        to their average steepness; where it would be nearer if it were `_STEEPER` times as steep as that, it and the
        next, ``doubtful`` in all, are linearised.
        """
        doubtful = min(doubtful, self.classes - 1 - sure)
        if doubtful <= 0 or not len(rows):
            return short
        own = self.labels[rows].unsqueeze(1)
        known = self.strongest(own, self.answer[rows], sure)
        gap, left = (logits.gather(1, own) - logits for logits in (self.answer[rows], self.latest[rows]))
        taken = self.length(self.x[rows] - self.start[rows]).unsqueeze(1)
        speed = (gap - left) / taken.clamp_min(1e-30)
        usual = speed.gather(1, known).mean(1, keepdim=True)
        steepness = (self.steepness[rows].unsqueeze(1) + speed - usual).clamp_min(1e-30)
        reach = (gap / (_STEEPER * steepness)).scatter(1, torch.cat([own, known], 1), torch.inf)
        reach, rivals = reach.topk(doubtful, dim=1, largest=False)
        asked = reach[:, 0] < taken.squeeze(1)
        rows, rivals = rows[asked], rivals[asked]
        moved = torch.zeros_like(self.wrong)
        for here, _, difference, normals, found in self.planes(rows, self.start[rows], rivals):
            at = rows[here]
            move = self.shortest(self.start[at], normals, self.pad[at].unsqueeze(1) - difference, back=False)
            moved[at] = found & (self.length(move) < self.length(self.x[at] - self.start[at]))
            self.x[at] = torch.where(moved[at].unsqueeze(1), (self.start[at] + move).clamp(0, 1), self.x[at])
        return torch.cat([short[~moved[short]], self.short(moved.nonzero().squeeze(1))])

    def approach(self, rows: Tensor, classes: int, back: bool, steps: int) -> None:
        """DeepFool from where ``x`` is to beyond the boundary.

        Args:
            rows: those that are not there yet.
            classes: rivals linearised at each step.
            back: whether all of these rows are misclassified, or none.
            steps: linearisations at most, the one at the image included.
        """
        x = self.x
        for step in range(1, steps):
            if not len(rows):
                return
            alive = torch.zeros_like(rows, dtype=torch.bool)
            pad = self.pad * 1.5 ** min(max(0, step - 4), 12)
            for here, _, difference, normals, found in self.planes(rows, x[rows], classes):
                at = rows[here]
                move = self.shortest(x[at], normals, pad[at].unsqueeze(1) - difference, back)
                x[at] = (x[at] + move).clamp(0, 1)
                alive[here] = found & (move.abs().amax(1) > 0)  # in a corner of the box there is nowhere left to go
            self.steps[rows] += 1
            rows = self.short(rows[alive])

    def shortest(self, base: Tensor, normals: Tensor, offsets: Tensor, back: bool) -> Tensor:
        """The move ``[b, D]`` onto the nearest half-space or, ``back``, into all of them."""
        up, down = 1 - base, base
        if back:
            return intersection(up, down, normals, offsets, self.norm)
        length, time = distances(up, down, normals, offsets, self.norm)
        # Out of reach in the box: go there anyway, as far as the box allows, and look again.
        reachable = torch.where(length.isinf() & (normals.abs().amax(-1) > 0), FAR, length)
        nearest = reachable.argmin(1, keepdim=True)
        pick = nearest.unsqueeze(-1).expand(-1, -1, base.shape[1])
        time = torch.where(length.isinf(), FAR, time).gather(1, nearest).squeeze(1)
        return displacement(up, down, normals.gather(1, pick).squeeze(1), time, self.norm)

    def confirm(self) -> None:
        """Have every crossing seen by the model itself; one that it does not see is looked for a little farther out."""
        rows = self.distance.isfinite().nonzero().squeeze(1)
        for stretch in (1.0, 1.001, 1.01, 1.05):
            if not len(rows):
                return
            x = (self.start[rows] + stretch * (self.best[rows] - self.start[rows])).clamp(0, 1)
            seen = self.level(rows, self.network.exact(x)) > self.floor[rows]
            self.best[rows] = x
            self.distance[rows] = torch.where(seen, self.length(x - self.start[rows]), torch.inf)
            rows = rows[~seen]
