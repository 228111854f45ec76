"""The other free dial: all data at full eps with another TRADES weight."""

from __future__ import annotations

import math

from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.registry import strategy


@strategy("trades-weight", prunes="", source="Zhang et al. 2019, arXiv 1901.08573", control=True)
def trades_weight(problem: Problem, *, beta: float = 2.0) -> Choice:
    """All data, full eps, TRADES weight ``beta`` (not negative) in place of the recipe's."""
    beta = fraction("beta", beta, high=math.inf)
    return Choice(problem.everything(), problem.uniform(), trades_weight=beta)
