"""The control that costs nothing: all data with a smaller eps."""

from __future__ import annotations

from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.registry import strategy


@strategy("uniform-eps", prunes="", source="control", control=True)
def uniform_eps(problem: Problem, *, scale: float = 0.5) -> Choice:
    """All data, every eps times ``scale`` (in [0, 1])."""
    scale = fraction("scale", scale)
    return Choice(problem.everything(), problem.uniform(scale * problem.threat.eps))
