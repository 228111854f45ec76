"""Control: puma's data at puma's mean eps, without the cap's aim."""

from __future__ import annotations

import numpy as np

from puma.strategies.problem import Choice, Problem
from puma.strategies.puma import C, puma
from puma.strategies.registry import strategy


@strategy("easy-matched", prunes="high margin", source="control", compares=True, control=True, needs=("margin",))
def easy_matched(problem: Problem, *, c: float = C, spend: float | None = None) -> Choice:
    """PE with one eps for all kept rows, equal to the mean eps of puma with the same parameters."""
    choice = puma(problem, c=c, spend=spend)
    mean = float(choice.eps[choice.keep].mean(dtype=np.float64))
    return Choice(choice.keep, problem.uniform(mean), {"puma_c": choice.derived["c"], "eps": mean})
