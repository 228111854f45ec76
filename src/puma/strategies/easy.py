"""PE: prune the easy end."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem
from puma.strategies.registry import strategy


@strategy(
    "easy",
    prunes="high margin",
    source="arXiv 2405.06298 (PE); Sorscher et al. 2022, arXiv 2206.14486",
    needs=("margin",),
)
def easy(problem: Problem) -> Choice:
    """PE: drop the highest margins; full eps."""
    return Choice(problem.drop(problem.margin, "high"), problem.uniform())
