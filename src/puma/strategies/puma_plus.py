"""PUMA with what our theory adds: an automatic c and a ceiling on misclassified rows."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from puma.strategies.cap import automatic_c, capped_eps
from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.quotas import extreme
from puma.strategies.registry import strategy


@strategy(
    "puma-plus",
    prunes="lowest margin beyond a ceiling, then high margin",
    source="our own",
    compares=True,
    needs=("margin",),
)
def puma_plus(problem: Problem, *, c: float | Literal["auto"] = "auto", max_misclassified: float = 0.2) -> Choice:
    """Like puma, but c keeps the mislabelled mass constant and misclassified rows have a ceiling.

    The budget of each quota first takes the most negative margins beyond the share ``max_misclassified`` (in [0, 1]) of
    what the quota keeps, then the highest margins; it is never exceeded, so that the ceiling is only reached where the
    budget allows it. ``c="auto"`` is `puma.strategies.cap.automatic_c`.
    """
    max_misclassified = fraction("max_misclassified", max_misclassified)
    keep = _drop_both_ends(problem, max_misclassified)
    if c == "auto":
        derived = automatic_c(problem, keep)
    else:
        derived = {"c": fraction("c", c, high=math.inf, open_low=True)}
    return Choice(keep, capped_eps(problem, derived["c"]), derived)


def _drop_both_ends(problem: Problem, max_misclassified: float) -> NDArray[np.bool_]:
    keep = problem.everything()
    for group in problem.quotas:
        margin = problem.margin[group.rows]
        rng = problem.rng(1, group.code)
        allowed = math.floor(max_misclassified * (len(group.rows) - group.remove) + 1e-9)
        excess = max(int(np.count_nonzero(margin < 0)) - allowed, 0)
        gone = extreme(margin, min(excess, group.remove), "low", rng)
        margin[gone] = np.nan
        gone |= extreme(margin, group.remove - int(np.count_nonzero(gone)), "high", rng)
        keep[group.rows[gone]] = False
    return keep
