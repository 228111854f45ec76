"""Square in L2 for the image sizes on which the library's version fails."""

from __future__ import annotations

import math

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor


def library_fails(height: int, width: int) -> bool:
    """Whether the library's Square fails in L2 on images of this size.

    Its first perturbation is a grid of tiles of side ``s = height // 5``, laid from the margin ``(height - 5 s) // 2``
    without a look at the border: it fails where a tile reaches beyond the image (sides 12, 14, 18, 19 and 24, and many
    that are not square), and below 5 pixels, where ``s`` is 0.

    >>> [side for side in range(5, 400) if library_fails(side, side)]
    [12, 14, 18, 19, 24]
    >>> library_fails(28, 20), library_fails(4, 4), library_fails(28, 28)
    (True, True, False)
    """
    side = height // 5
    margin = (height - 5 * side) // 2
    beyond = any(margin + size // max(side, 1) * side > size for size in (height, width))
    return side == 0 or (side > 1 and width >= side and beyond)


class SquareL2(SquareAttack):  # type: ignore[misc]  # the library has no types
    """The library's Square in L2 (arXiv 1912.00049) with tiles cut at the border; equal bits where that one works."""

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Attack ``x`` ``[B, C, H, W]``; return the number of queries of each image and the best images."""
        channels, height, width = x.shape[1:]
        grid, tile = torch.zeros_like(x), max(height // 5, 1)
        margin = max((height - tile * 5) // 2, 0)
        for row in range(margin, margin + height // tile * tile, tile):
            for column in range(margin, margin + width // tile * tile, tile):
                pattern = self.eta(tile).view(1, 1, tile, tile) * self.random_choice([len(x), channels, 1, 1])
                place = grid[:, :, row : row + tile, column : column + tile]
                place += pattern[:, :, : place.shape[2], : place.shape[3]]
        best = torch.clamp(x + self.normalize(grid) * self.eps, 0.0, 1.0)
        margins, losses = self.margin_and_loss(best, y)
        queries = torch.ones(len(x)).to(x.device)
        if (margins < 0.0).all():
            return queries, best
        for step in range(self.n_queries):
            rows = (margins > 0.0).nonzero().flatten()
            clean, labels, delta = x[rows], y[rows], best[rows] - x[rows]
            side = max(round(math.sqrt(self.p_selection(step) * height * width)), 3)
            side = min(side + (side % 2 == 0), height, width)
            one, two = self._window(height, width, side), self._window(height, width, side)
            mask = torch.zeros_like(clean)
            mask[one] = mask[two] = 1.0
            norm = self.lp_norm(delta)
            budget = ((delta * mask) ** 2).sum(dim=(-2, -1), keepdim=True).sqrt()  # norm of both windows
            old = delta[one] / (1e-12 + (delta[one] ** 2).sum(dim=(-2, -1), keepdim=True).sqrt())
            pattern = torch.ones([len(rows), channels, side, side]).to(x.device)
            pattern *= self.eta(side).view(1, 1, side, side) * self.random_choice([len(rows), channels, 1, 1])
            pattern += old
            unused = torch.clamp((self.eps * torch.ones_like(pattern)) ** 2 - norm**2, min=0) / channels
            pattern = pattern / (1e-12 + (pattern**2).sum(dim=(-2, -1), keepdim=True).sqrt())
            delta[two] = 0.0
            delta[one] = pattern * (unused + budget**2).sqrt()
            candidate = torch.clamp(clean + self.normalize(delta) * self.eps, 0.0, 1.0)
            margin, loss = self.margin_and_loss(candidate, labels)
            better = loss < losses[rows]
            losses[rows] = torch.where(better, loss, losses[rows])
            better |= margin <= 0.0
            margins[rows] = torch.where(better, margin, margins[rows])
            best[rows] = torch.where(better.view(-1, 1, 1, 1), candidate, best[rows])
            queries[rows] += 1
            if not (margins > 0.0).any():
                break
        return queries, best

    def _window(self, height: int, width: int, side: int) -> tuple[slice, slice, slice, slice]:
        row, column = int(self.random_int(0, height - side)), int(self.random_int(0, width - side))
        return slice(None), slice(None), slice(row, row + side), slice(column, column + side)
