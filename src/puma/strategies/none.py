"""Everything, attacked at full strength."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem
from puma.strategies.registry import strategy


@strategy("none", prunes="", source="the baseline")
def none(problem: Problem) -> Choice:
    """All data, full eps."""
    return Choice(problem.everything(), problem.uniform())
