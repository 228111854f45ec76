"""Control: puma's cap on a random subset."""

from __future__ import annotations

import math

from puma.strategies.cap import capped_eps
from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.puma import C
from puma.strategies.registry import strategy


@strategy("random-cap", prunes="any", source="control", compares=True, control=True, needs=("margin",))
def random_cap(problem: Problem, *, c: float = C) -> Choice:
    """Drop rows at random (the same as strategy random of that seed), with puma's eps on the rest."""
    c = fraction("c", c, high=math.inf, open_low=True)
    return Choice(problem.drop(problem.random_scores(), "high"), capped_eps(problem, c), {"c": c})
