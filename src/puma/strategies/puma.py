"""PUMA, faithful to the abstract of arXiv 2405.06298; the formula of the cap is ours."""

from __future__ import annotations

import math

from puma.errors import UsageError
from puma.strategies.cap import c_for_spend, capped_eps
from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.registry import strategy

C = 0.5


@strategy("puma", prunes="high margin", source="arXiv 2405.06298", compares=True, needs=("margin",))
def puma(problem: Problem, *, c: float = C, spend: float | None = None) -> Choice:
    """Drop the highest margins; eps_i = min(eps, c * max(margin_i, 0)).

    ``spend``, in (0, 1], solves for c: the mean eps over the kept rows becomes that share of the threat model's eps.

    Raises:
        UsageError: ``c`` not positive, ``spend`` out of reach, or both given.
    """
    if spend is not None and c != C:
        raise UsageError("c and spend cannot both be given", why="spend solves for c", fix="leave one of them out")
    c = fraction("c", c, high=math.inf, open_low=True)
    keep = problem.drop(problem.margin, "high")
    if spend is not None:
        c = c_for_spend(problem, keep, fraction("spend", spend, open_low=True))
    return Choice(keep, capped_eps(problem, c), {"c": c})
