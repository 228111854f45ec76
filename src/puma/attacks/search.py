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
from puma.norms import Norm

Planes = tuple[slice, Tensor, Tensor, Tensor, Tensor]

# The level beyond the boundary at which a step aims, as a share of the first logit gap: without it DeepFool stalls on
# ties; in logits rather than in pixels it costs every image the same share of its margin.
_PAD = 0.005
# A level counts as beyond the boundary from here on, as a share of the logits' size: float32 passes of the same image
# in another batch or memory format differ by less.
_FLOOR = 1e-6
# How much steeper than the boundaries already linearised the others may be.
_STEEPER = 1.6
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
        self.answer = start.new_zeros(len(start), self.classes)
        self.steepest = torch.zeros_like(self.distance)

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

    def planes(self, rows: Tensor, x: Tensor, classes: int, first: bool = False, beyond: int = 0) -> Iterator[Planes]:
        """Linearise the boundaries to the ``classes`` strongest rivals at ``x``, without the ``beyond`` first of them.

        Yields chunk by chunk the slice of the rows, the levels ``[b]``, ``f_up - f_down`` ``[b, m]``, its gradients
        ``[b, m, D]``, and whether they lead anywhere ``[b]``; the status of a row says why they do not.
        """
        count = min(classes, self.classes - 1)

        def choose(here: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
            if first:
                self.look(rows[here], self.network.exact(x[here], logits))
            own = self.labels[rows[here]].unsqueeze(1)
            rivals = logits.scatter(1, own, -torch.inf).topk(count, dim=1).indices[:, beyond:]
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
                self.steepest[at] = dual_length(normals, self.norm).amax(1)
            yield here, level, torch.where(healthy.unsqueeze(1), difference, 0.0), normals, found

    def reconsider(self, rows: Tensor, sure: int, candidates: int) -> None:
        """Take the first step to one of the further rivals where that is shorter.

        The first step knows the ``sure`` strongest rivals. The others, up to ``candidates``, are linearised only where
        the next of them would be nearer if it changed `_STEEPER` times as fast as the fastest of those known.
        """
        if min(candidates, self.classes - 1) <= sure:
            return
        own = self.answer[rows].gather(1, self.labels[rows].unsqueeze(1))
        rivals = self.answer[rows].scatter(1, self.labels[rows].unsqueeze(1), -torch.inf)
        gap = own.squeeze(1) - rivals.topk(sure + 1, dim=1).values[:, sure]
        taken = self.length(self.x[rows] - self.start[rows])
        rows = rows[gap < _STEEPER * self.steepest[rows] * taken]
        for here, _, difference, normals, found in self.planes(rows, self.start[rows], candidates, beyond=sure):
            at = rows[here]
            move = self.shortest(self.start[at], normals, self.pad[at].unsqueeze(1) - difference, back=False)
            shorter = found & (self.length(move) < self.length(self.x[at] - self.start[at]))
            self.x[at] = torch.where(shorter.unsqueeze(1), (self.start[at] + move).clamp(0, 1), self.x[at])

    def approach(self, rows: Tensor, classes: int, back: bool, steps: int) -> None:
        """DeepFool from where ``x`` is to beyond the boundary; ``back``: all of these rows are misclassified."""
        x = self.x
        for step in range(1, steps + 1):
            rows = rows[~self._through(rows)] if len(rows) else rows
            if not len(rows) or step == steps:
                return
            alive = torch.zeros_like(rows, dtype=torch.bool)
            pad = self.pad * 1.5 ** min(max(0, step - 4), 12)
            for here, _, difference, normals, found in self.planes(rows, x[rows], classes):
                at = rows[here]
                move = self.shortest(x[at], normals, pad[at].unsqueeze(1) - difference, back)
                x[at] = (x[at] + move).clamp(0, 1)
                alive[here] = found & (move.abs().amax(1) > 0)  # in a corner of the box there is nowhere left to go
            self.steps[rows] += 1
            rows = rows[alive]

    def _through(self, rows: Tensor) -> Tensor:
        """bool ``[b]``: which rows are beyond the boundary, or ended in NaN."""
        level = self.attempt(rows, self.x[rows])
        broken = level.isnan()
        self.codes[rows] = torch.where(broken & ~self.wrong[rows], int(Status.NAN), self.codes[rows]).to(torch.int8)
        return (level > self.floor[rows]) | broken

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
