"""PD: prune the difficult end."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem
from puma.strategies.registry import strategy


@strategy(
    "difficult",
    prunes="low margin",
    source="arXiv 2405.06298 (PD); Dong et al. 2021, arXiv 2102.07437",
    needs=("margin",),
)
def difficult(problem: Problem) -> Choice:
    """PD: drop the lowest margins (misclassified rows go first); full eps."""
    return Choice(problem.drop(problem.margin, "low"), problem.uniform())
