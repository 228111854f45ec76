"""Control: does it matter *which* image gets the small eps?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from puma.strategies.problem import Choice, Problem
from puma.strategies.puma import C, puma
from puma.strategies.registry import strategy


@strategy("puma-shuffled", prunes="high margin", source="control", compares=True, control=True, needs=("margin",))
def puma_shuffled(problem: Problem, *, c: float = C, spend: float | None = None) -> Choice:
    """Puma's kept set with its eps values permuted among the kept rows: same data, same eps histogram."""
    choice = puma(problem, c=c, spend=spend)
    kept = np.flatnonzero(choice.keep)
    choice.eps[kept] = problem.rng(3).permutation(choice.eps[kept])
    return replace(choice, derived={"puma_c": choice.derived["c"]})
