"""EL2N on adversarial images: how far the model's probabilities are from the label, early in training."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem
from puma.strategies.registry import strategy


@strategy("el2n-adv", prunes="low error", source="Paul et al. 2021, arXiv 2107.07075", needs=("el2n-adv",))
def el2n_adv(problem: Problem) -> Choice:
    """Drop the lowest EL2N error on adversarial images (the easy ones); full eps."""
    return Choice(problem.drop(problem.score("el2n-adv"), "low"), problem.uniform())
