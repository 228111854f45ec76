"""Coverage-centric selection on the margin: drop the hardest few, then thin all strata alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puma.strategies.problem import Choice, Problem, fraction, whole
from puma.strategies.quotas import extreme
from puma.strategies.registry import strategy


@strategy("ccs", prunes="lowest margin, then any", source="Zheng et al. 2023, arXiv 2210.15809", needs=("margin",))
def ccs(problem: Problem, *, beta: float = 0.1, bins: int = 50) -> Choice:
    """Drop the share beta of lowest margins, then fill equal-width strata of the margin evenly; full eps.

    In each quota the share ``beta`` of hardest rows goes first (never more than the quota). The range of the other
    margins is cut into ``bins`` of equal width, and the bins, smallest first, each keep ``remaining / remaining bins``
    rows, drawn at random.
    """
    beta, bins = fraction("beta", beta), whole("bins", bins, low=1)
    keep = problem.everything()
    for group in problem.quotas:
        margin = problem.margin[group.rows]
        rng = problem.rng(1, group.code)
        present = int(np.count_nonzero(~np.isnan(margin)))
        gone = extreme(margin, min(int(np.floor(beta * present + 1e-9)), group.remove), "low", rng)
        rest = np.flatnonzero(~gone & ~np.isnan(margin))
        room = max(len(rest) - (group.remove - int(np.count_nonzero(gone))), 0)
        gone[rest] = True
        gone[rest[_spread(margin[rest], room, bins, rng)]] = False
        keep[group.rows[gone]] = False
    return Choice(keep, problem.uniform())


def _spread(margin: NDArray[np.float32], room: int, bins: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Places of ``room`` rows spread over equal-width bins of ``margin`` (-inf falls into the lowest bin)."""
    if not room:
        return np.empty(0, np.int64)
    finite = margin[np.isfinite(margin)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    edges = np.linspace(low, high, bins + 1)[1:-1]
    stratum = np.searchsorted(edges, margin, side="right")
    order = np.argsort(stratum, kind="stable")
    sizes = np.bincount(stratum, minlength=bins)
    starts = np.cumsum(sizes) - sizes
    chosen = []
    for served, bin_ in enumerate(np.argsort(sizes, kind="stable")):
        take = min(int(sizes[bin_]), room // (bins - served))
        members = order[starts[bin_] : starts[bin_] + sizes[bin_]]
        chosen.append(members if take == len(members) else rng.choice(members, take, replace=False))
        room -= take
    return np.concatenate(chosen)
