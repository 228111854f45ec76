"""Control: what the cap does without pruning."""

from __future__ import annotations

import math

from puma.strategies.cap import capped_eps
from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.puma import C
from puma.strategies.registry import strategy


@strategy("cap-only", prunes="", source="control", compares=True, control=True, needs=("margin",))
def cap_only(problem: Problem, *, c: float = C) -> Choice:
    """All data with puma's eps: the cap without the pruning."""
    c = fraction("c", c, high=math.inf, open_low=True)
    return Choice(problem.everything(), capped_eps(problem, c), {"c": c})
