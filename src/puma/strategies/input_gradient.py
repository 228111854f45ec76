"""EasyCore: the norm of the loss gradient at the image, averaged over training."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem
from puma.strategies.registry import strategy


@strategy("input-gradient", prunes="high gradient", source="EasyCore, arXiv 2510.11018", needs=("input-gradient",))
def input_gradient(problem: Problem) -> Choice:
    """Drop the largest mean input-gradient norms (the hard ones); full eps."""
    return Choice(problem.drop(problem.score("input-gradient"), "high"), problem.uniform())
