"""PUMA, the baselines and controls of the paper, and the cap on the training eps: ``min(eps, c * max(margin_i, 0))``.

With ``c = 1`` no attack reaches beyond the margin model's boundary; smaller c gives more clean, less robust accuracy.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from puma.errors import UsageError, number
from puma.margins import MarginTable
from puma.strategies.registry import Positive, Ratio, Selection, SelectionContext, Share, extreme, strategy
from puma.threat import ThreatModel

C, C_RANGE = 1.0, (0.25, 0.75)
_MARGIN = ("margin",)
_DONG = "arXiv 2405.06298 (PD); Dong et al. 2021, arXiv 2102.07437"
_SORSCHER = "arXiv 2405.06298 (PE); Sorscher et al. 2022, arXiv 2206.14486"
_CEILING = "lowest margin beyond a ceiling, then high margin"


@strategy("none", prunes="", source="the baseline")
def none(context: SelectionContext) -> Selection:
    """All data, full eps."""
    return Selection(context.keep_all(), context.uniform_eps())


@strategy("random", prunes="any", source="Kaufmann et al. 2022, arXiv 2207.00694")
def random(context: SelectionContext) -> Selection:
    """Drop rows at random, by the same quotas as every strategy; full eps."""
    return Selection(context.drop(context.random_scores(), "high"), context.uniform_eps())


@strategy("difficult", prunes="low margin", source=_DONG, needs=_MARGIN)
def difficult(context: SelectionContext) -> Selection:
    """PD: drop the lowest margins (misclassified rows first); full eps."""
    return Selection(context.drop(context.margin, "low"), context.uniform_eps())


@strategy("easy", prunes="high margin", source=_SORSCHER, needs=_MARGIN)
def easy(context: SelectionContext) -> Selection:
    """PE: drop the highest margins; full eps."""
    return Selection(context.drop(context.margin, "high"), context.uniform_eps())


@strategy("puma", prunes="high margin", source="arXiv 2405.06298", compares=True, needs=_MARGIN)
def puma(context: SelectionContext, *, c: Positive = C, mean_eps_ratio: Ratio = None) -> Selection:
    """Drop the highest margins; eps_i = min(eps, c * max(margin_i, 0)).

    ``mean_eps_ratio``, in (0, 1], solves for c: the mean eps over the kept rows becomes that share of the threat
    model's eps, or `UsageError` if it is out of reach.
    """
    if mean_eps_ratio is not None and c != C:
        raise UsageError("c and mean_eps_ratio cannot both be given", fix="leave one of them out")
    keep = context.drop(context.margin, "high")
    if mean_eps_ratio is not None:
        c = c_for_mean_eps(context, keep, mean_eps_ratio)
    return Selection(keep, capped_eps(context, c), {"c": c})


@strategy("puma-plus", prunes=_CEILING, source="our own", compares=True, needs=_MARGIN)
def puma_plus(
    context: SelectionContext,
    *,
    c: Annotated[float | str, partial(number, open_low=True)] = "auto",
    max_misclassified: Share = 0.2,
) -> Selection:
    """Like puma, but c keeps the mislabelled mass constant and misclassified rows have a ceiling.

    Each quota first takes the most negative margins beyond the share ``max_misclassified`` (in [0, 1]) of the rows that
    it keeps, then the highest margins; it is never exceeded. ``c="auto"`` is `automatic_c`.
    """
    keep = context.keep_all()
    for code, rows, remove in context.quotas:
        margin, rng = context.margin[rows], context.rng(1, code)
        allowed = math.floor(max_misclassified * (len(rows) - remove) + 1e-9)
        excess = max(int(np.count_nonzero(margin < 0)) - allowed, 0)
        removed = extreme(margin, min(excess, remove), "low", rng)
        margin[removed] = np.nan
        removed |= extreme(margin, remove - int(np.count_nonzero(removed)), "high", rng)
        keep[rows[removed]] = False
    if c != "auto":
        return Selection(keep, capped_eps(context, float(c)), {"c": float(c)})
    facts, kept = regime(context.table, context.threat), int(np.count_nonzero(keep)) / len(keep)
    c = automatic_c(**facts, kept_share=kept)
    return Selection(keep, capped_eps(context, c), {"c": c, "kept_share": kept, **facts})


# --- controls: all data with another eps or TRADES weight costs nothing; the others isolate a mechanism of PUMA ---


@strategy("uniform-eps", prunes="", source="control", control=True)
def uniform_eps(context: SelectionContext, *, scale: Annotated[float, partial(number, high=2)] = 0.5) -> Selection:
    """All data, every eps times ``scale`` (in [0, 2])."""
    return Selection(context.keep_all(), context.uniform_eps(scale * context.threat.eps))


@strategy("trades-beta", prunes="", source="Zhang et al. 2019, arXiv 1901.08573", control=True)
def trades_beta(context: SelectionContext, *, beta: Annotated[float, number] = 2.0) -> Selection:
    """All data, full eps, TRADES weight ``beta`` (not negative) in place of the recipe's."""
    return Selection(context.keep_all(), context.uniform_eps(), beta=beta)


@strategy("cap-only", prunes="", source="control", compares=True, control=True, needs=_MARGIN)
def cap_only(context: SelectionContext, *, c: Positive = C) -> Selection:
    """All data with puma's eps: the cap without the pruning."""
    return Selection(context.keep_all(), capped_eps(context, c), {"c": c})


@strategy("random-cap", prunes="any", source="control", compares=True, control=True, needs=_MARGIN)
def random_cap(context: SelectionContext, *, c: Positive = C) -> Selection:
    """Drop rows at random (the same as strategy random of that seed), with puma's eps on the rest."""
    return Selection(context.drop(context.random_scores(), "high"), capped_eps(context, c), {"c": c})


@strategy("easy-matched", prunes="high margin", source="control", compares=True, control=True, needs=_MARGIN)
def easy_matched(context: SelectionContext, *, c: Positive = C, mean_eps_ratio: Ratio = None) -> Selection:
    """PE with one eps for all kept rows, equal to the mean eps of puma with the same parameters."""
    selection = puma(context, c=c, mean_eps_ratio=mean_eps_ratio)
    mean = float(selection.eps[selection.keep].mean(dtype=np.float64))
    return Selection(selection.keep, context.uniform_eps(mean), {"puma_c": selection.derived["c"], "eps": mean})


@strategy("puma-shuffled", prunes="high margin", source="control", compares=True, control=True, needs=_MARGIN)
def puma_shuffled(context: SelectionContext, *, c: Positive = C, mean_eps_ratio: Ratio = None) -> Selection:
    """Puma's kept set with its eps values permuted among the kept rows: same data, same eps histogram."""
    selection = puma(context, c=c, mean_eps_ratio=mean_eps_ratio)
    kept = np.flatnonzero(selection.keep)
    selection.eps[kept] = context.rng(3).permutation(selection.eps[kept])
    return replace(selection, derived={"puma_c": selection.derived["c"]})


def regime(table: MarginTable, threat: ThreatModel) -> dict[str, float]:
    """How large eps is for this margin model; CIFAR-10 at its published scale has about 0.08 and 0.3.

    ``misclassified`` (margin < 0) and ``below_eps`` (0 < margin < eps), shares of the rows that have a margin; empty
    where none has or the norm is another.
    """
    margin = table.margin[~np.isnan(table.margin)]
    if table.norm != threat.norm or not len(margin):
        return {}
    below = (margin > 0) & (margin < np.float32(threat.eps))
    return {"misclassified": float(np.mean(margin < 0)), "below_eps": float(np.mean(below))}


def capped_eps(context: SelectionContext, c: float) -> NDArray[np.float32]:
    """``min(eps, c * max(margin, 0))``, float32 ``[N]``; rows without margin get eps."""
    eps = np.multiply(context.margin, np.float32(c), dtype=np.float32)
    np.clip(eps, 0, np.float32(context.threat.eps), out=eps)
    eps[np.isnan(eps)] = context.threat.eps
    return eps


def automatic_c(misclassified: float, below_eps: float, kept_share: float) -> float:
    """The ``c`` that keeps the share of mislabelled perturbed images at its value before pruning.

    With err, p and f the arguments, the linear task mislabels p if everything is attacked at eps, and ``err * c / ((1 -
    c) f)`` after pruning with the cap. Equal at ``c = p f / (p f + err)``, clipped to [0.25, 0.75]; 0.75 if both are 0.
    """
    mass = below_eps * kept_share
    return float(np.clip(mass / (mass + misclassified), *C_RANGE)) if mass + misclassified > 0 else C_RANGE[1]


def c_for_mean_eps(context: SelectionContext, keep: NDArray[np.bool_], ratio: float) -> float:
    """The ``c`` at which the mean eps over the rows ``keep`` (bool ``[N]``) is ``ratio``, in (0, 1], times eps.

    The mean is piecewise linear in c, with corners at ``eps / margin``, and solved exactly; `UsageError` out of reach.
    """
    eps, margin = context.threat.eps, context.margin[keep]
    rows = len(margin)
    full = int(np.count_nonzero(np.isnan(margin)))  # rows without a margin have full eps whatever c is
    margin = np.sort(margin[margin > 0])
    least, most = full / rows, (full + len(margin)) / rows
    if not least < ratio <= most * (1 + 1e-12) or eps == 0:
        why = "misclassified rows train clean and rows without a margin at full eps: "
        why += f"the ratio can be more than {least:.4g} and at most {most:.4g}"
        fix = "choose a mean_eps_ratio between the two"
        raise UsageError(f"no c gives a mean eps of {ratio:g} times eps", why=why, fix=fix)
    # with c = eps / margin[k] the rows up to k have eps_i = c * margin_i and those beyond have eps: the mean falls with
    # k; for c between the corners of k + 1 and k, rows 0..k follow the cap and the others are at eps
    sums = np.cumsum(margin, dtype=np.float64)
    target, beyond = ratio * rows - full, np.arange(len(margin) - 1, -1, -1)
    k = max(int(np.count_nonzero(sums / margin + beyond >= target)) - 1, 0)
    return float((target - beyond[k]) / (float(sums[k]) / eps))
