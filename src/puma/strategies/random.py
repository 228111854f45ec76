"""Random pruning: the cheapest baseline, and hard to beat at scale."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem
from puma.strategies.registry import strategy


@strategy("random", prunes="any", source="Kaufmann et al. 2022, arXiv 2207.00694")
def random(problem: Problem) -> Choice:
    """Drop rows at random, by the same quotas as every strategy; full eps."""
    return Choice(problem.drop(problem.random_scores(), "high"), problem.uniform())
