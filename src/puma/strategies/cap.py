"""The cap on the attack norm: ``eps_i = min(eps, c * max(margin_i, 0))``, and how its ``c`` is chosen.

An attack that moves an image by less than its margin cannot carry it over the margin model's boundary. With ``c = 1``
about half of the capped images still end up beyond the *true* boundary, however good the margin model is; with
``c = 1/2`` their share equals the margin model's own error (``err * c / (1 - c)`` in the linear task).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puma.errors import UsageError
from puma.strategies.problem import Problem

C_RANGE = (0.25, 0.75)


def capped_eps(problem: Problem, c: float, limit: float | None = None) -> NDArray[np.float32]:
    """``min(limit, c * max(margin, 0))`` for every row, the threat model's eps for rows without a margin.

    Args:
        problem: gives margins ``[N]`` and the threat model.
        c: share of the margin an attack may use up, positive.
        limit: the largest eps; the threat model's unless given.

    Returns:
        float32 ``[N]``; 0 for misclassified rows.
    """
    eps = np.multiply(problem.margin, np.float32(c), dtype=np.float32)
    np.clip(eps, 0, np.float32(problem.threat.eps if limit is None else limit), out=eps)
    eps[np.isnan(eps)] = problem.threat.eps
    return eps


def automatic_c(problem: Problem, keep: NDArray[np.bool_]) -> dict[str, float]:
    """The ``c`` that keeps the share of mislabelled perturbed images what it was before pruning.

    ``c = p f / (p f + err)``, clipped to [0.25, 0.75]: attacking everything mislabels the share p of rows; after
    pruning to f with the cap it is ``err * c / ((1 - c) f)``, and the two are set equal.

    Args:
        problem: gives margins and eps.
        keep: bool ``[N]``, the kept rows.

    Returns:
        ``c``, ``kept_share`` (f, of the whole pool), ``below_eps`` (p, the share with 0 < margin < eps) and
        ``misclassified`` (err, the share with margin < 0); the last two over all rows with a margin.
    """
    margin = problem.margin
    with_margin = len(margin) - int(np.count_nonzero(np.isnan(margin)))
    negative, positive = int(np.count_nonzero(margin < 0)), int(np.count_nonzero(margin > 0))
    beyond = int(np.count_nonzero(margin >= np.float32(problem.threat.eps)))
    err, p = negative / with_margin, (positive - min(beyond, positive)) / with_margin
    f = int(np.count_nonzero(keep)) / len(keep)
    c = p * f / (p * f + err) if p + err > 0 else C_RANGE[1]
    return {"c": float(np.clip(c, *C_RANGE)), "kept_share": f, "below_eps": p, "misclassified": err}


def c_for_spend(problem: Problem, keep: NDArray[np.bool_], spend: float) -> float:
    """The ``c`` at which the mean eps over the kept rows is ``spend`` times the threat model's eps.

    The mean is a rising, piecewise linear function of c whose corners lie at ``eps / margin``: a binary search over
    the sorted margins finds the piece, which is then solved exactly.

    Args:
        problem: gives margins and eps.
        keep: bool ``[N]``, the kept rows.
        spend: target, in (0, 1].

    Raises:
        UsageError: no c reaches it, because misclassified rows train clean.
    """
    eps = problem.threat.eps
    margin = problem.margin[keep]
    rows = len(margin)
    full = int(np.count_nonzero(np.isnan(margin)))  # rows without a margin have full eps whatever c is
    margin = margin[margin > 0]
    margin.sort()
    least, most = full / rows, (full + len(margin)) / rows
    if not least < spend <= most * (1 + 1e-12) or eps == 0:
        raise UsageError(
            f"no c spends {spend:g} of the attack budget",
            why="misclassified rows train clean and rows without a margin at full eps: "
            f"more than {least:.4g} and up to {most:.4g} of it can be spent",
            fix="choose a spend between the two",
        )
    # with c = eps / margin[k] the rows up to k have eps_i = c * margin_i and those beyond have eps
    sums = np.cumsum(margin, dtype=np.float64)
    target = spend * rows - full
    low, high = 0, len(margin) - 1
    while low < high:  # the last corner k at which at least the target is spent (spending falls with k)
        middle = (low + high + 1) // 2
        if sums[middle] / float(margin[middle]) + (len(margin) - 1 - middle) >= target:
            low = middle
        else:
            high = middle - 1
    beyond = len(margin) - 1 - low
    # for c between the corners of low + 1 and low, rows 0..low follow the cap and `beyond` rows are at eps
    slope = float(sums[low]) / eps
    return float((target - beyond) / slope)
