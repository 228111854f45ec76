"""Tilt: hard images are attacked less than the threat model says, easy ones more."""

from __future__ import annotations

import math

from puma.strategies.cap import capped_eps
from puma.strategies.problem import Choice, Problem, fraction
from puma.strategies.puma import C
from puma.strategies.registry import strategy

KAPPA = 1.5


@strategy("tilt", prunes="high margin", source="our own", compares=True, beyond_eps=True, needs=("margin",))
def tilt(problem: Problem, *, c: float = C, kappa: float = KAPPA) -> Choice:
    """Drop the highest margins; eps_i = min(kappa * eps, c * max(margin_i, 0)), beyond eps for easy images.

    With ``prune_fraction=0`` nothing is dropped and only the attack norms are tilted. Rows without a margin get eps.
    """
    c = fraction("c", c, high=math.inf, open_low=True)
    kappa = fraction("kappa", kappa, low=1.0, high=math.inf)
    keep = problem.drop(problem.margin, "high")
    return Choice(keep, capped_eps(problem, c, kappa * problem.threat.eps), {"c": c})
