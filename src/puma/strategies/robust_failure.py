"""How often the attack succeeds on an image over the checkpoints of a run (a reading of Dong et al.'s score)."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem
from puma.strategies.registry import strategy


@strategy(
    "robust-failure", prunes="high frequency", source="Dong et al. 2021, arXiv 2102.07437", needs=("robust-failure",)
)
def robust_failure(problem: Problem) -> Choice:
    """Drop the images the attack most often succeeds on (the hard ones); full eps.

    The score takes only as many values as there were checkpoints: equal scores at the cut are drawn at random.
    """
    return Choice(problem.drop(problem.score("robust-failure"), "high"), problem.uniform())
