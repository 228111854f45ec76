"""Controls: what costs nothing (all data with another eps or TRADES weight), and what isolates a mechanism of PUMA."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from puma.strategies.context import Selection, SelectionContext, number
from puma.strategies.registry import strategy
from puma.strategies.rules import C, capped_eps, puma


@strategy("uniform-eps", prunes="", source="control", control=True, beyond_eps=True)
def uniform_eps(context: SelectionContext, *, scale: float = 0.5) -> Selection:
    """All data, every eps times ``scale`` (in [0, 2])."""
    scale = number("scale", scale, high=2)
    return Selection(context.keep_all(), context.uniform_eps(scale * context.threat.eps))


@strategy("trades-beta", prunes="", source="Zhang et al. 2019, arXiv 1901.08573", control=True)
def trades_beta(context: SelectionContext, *, beta: float = 2.0) -> Selection:
    """All data, full eps, TRADES weight ``beta`` (not negative) in place of the recipe's."""
    return Selection(context.keep_all(), context.uniform_eps(), beta=number("beta", beta))


@strategy("cap-only", prunes="", source="control", compares=True, control=True, needs=("margin",))
def cap_only(context: SelectionContext, *, c: float = C) -> Selection:
    """All data with puma's eps: the cap without the pruning."""
    c = number("c", c, open_low=True)
    return Selection(context.keep_all(), capped_eps(context, c), {"c": c})


@strategy("random-cap", prunes="any", source="control", compares=True, control=True, needs=("margin",))
def random_cap(context: SelectionContext, *, c: float = C) -> Selection:
    """Drop rows at random (the same as strategy random of that seed), with puma's eps on the rest."""
    c = number("c", c, open_low=True)
    return Selection(context.drop(context.random_scores(), "high"), capped_eps(context, c), {"c": c})


@strategy("easy-matched", prunes="high margin", source="control", compares=True, control=True, needs=("margin",))
def easy_matched(context: SelectionContext, *, c: float = C, mean_eps_ratio: float | None = None) -> Selection:
    """PE with one eps for all kept rows, equal to the mean eps of puma with the same parameters."""
    selection = puma(context, c=c, mean_eps_ratio=mean_eps_ratio)
    mean = float(selection.eps[selection.keep].mean(dtype=np.float64))
    return Selection(selection.keep, context.uniform_eps(mean), {"puma_c": selection.derived["c"], "eps": mean})


@strategy("puma-shuffled", prunes="high margin", source="control", compares=True, control=True, needs=("margin",))
def puma_shuffled(context: SelectionContext, *, c: float = C, mean_eps_ratio: float | None = None) -> Selection:
    """Puma's kept set with its eps values permuted among the kept rows: same data, same eps histogram."""
    selection = puma(context, c=c, mean_eps_ratio=mean_eps_ratio)
    kept = np.flatnonzero(selection.keep)
    selection.eps[kept] = context.rng(3).permutation(selection.eps[kept])
    return replace(selection, derived={"puma_c": selection.derived["c"]})
