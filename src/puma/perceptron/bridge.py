"""From the margins of real images to the quantities of the laboratory."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from puma.errors import DataError, UsageError
from puma.perceptron.gaussian import within


def bridge(margin: ArrayLike, eps: float, keep_fraction: float) -> dict[str, float]:
    """What the perceptron's theory says about pruning a real margin table; `puma plan --explain` shows it.

    The perceptron's ``s`` becomes the margin model's margin, so everything here is the theory of a *linear two-class
    student* applied to a network: a compass, no law. The kept rows are taken to be the ``keep_fraction`` of lowest
    margins, without quotas per class. The formulas are ours (this project's), read off the closed forms and grids of
    the docs page "perceptron".

    Args:
        margin: float ``[N]``, signed, in the threat model's norm; NaN rows are left out, -inf is misclassified.
        eps: attack norm in the same units as the margin.
        keep_fraction: kept share ``f`` in (0, 1].

    Returns:
        - ``rows``: rows with a margin; ``kept``: how many of them are kept.
        - ``misclassified``: share with a margin below 0 (``err``).
        - ``below_eps``: share with a margin from 0 to ``eps`` (``p``): attacked at full norm they may be mislabelled.
        - ``mislabelled_after_pruning``: ``min(1, p / f)``, that share among the kept rows.
        - ``c``: the suggested cap, ``p f / (p f + err)`` clipped to [0.25, 0.75] (0.75 where ``p + err = 0``): it keeps
          the mislabelled mass what it was before pruning.
        - ``residual_mislabelled``: ``err c / ((1 - c) f)``, predicted among the kept rows under this cap, at most 1.
        - ``safe_prune_fraction``: with the cap, ``1 - 4 err`` (at least 0): beyond it misclassified rows dominate.
        - ``safe_prune_fraction_uncapped``: without a cap, ``1 - 2.5 p`` (at least 0).
        - ``mean_margin``: mean over the kept rows; a -inf counts as the lowest finite margin.
        - ``mean_eps``: mean of ``min(eps, c max(margin, 0))`` over the kept rows.
        - ``collapse_margin``: ``mean_margin - mean_eps``; at or below 0 the theory predicts collapse under this cap.
        - ``collapse_margin_uncapped``: ``mean_margin - eps``, the same at full attack norm.

    >>> facts = bridge([-0.01, 0.01, 0.02, 0.05, 0.06], eps=0.03, keep_fraction=0.6)
    >>> round(facts["misclassified"], 2), round(facts["below_eps"], 2), round(facts["c"], 3)
    (0.2, 0.4, 0.545)
    >>> facts["collapse_margin_uncapped"] < 0 < facts["collapse_margin"]
    True

    Raises:
        DataError: no row has a margin.
        UsageError: ``eps`` negative, or ``keep_fraction`` outside (0, 1].
    """
    eps = float(within("eps", eps, 0, np.finfo(float).max))
    keep = float(within("keep_fraction", keep_fraction, 0, 1))
    if keep == 0:
        raise UsageError("keep_fraction is 0", why="nothing would be left to train on")
    margins = np.asarray(margin, np.float64).ravel()
    margins = np.sort(margins[~np.isnan(margins)])
    if not len(margins):
        raise DataError("no row has a margin", fix="score the pool again, or look at its statuses with `puma show`")
    rows = len(margins)
    kept = max(1, math.floor(keep * rows + 0.5))
    err = float(np.mean(margins < 0))
    below = float(np.mean((margins > 0) & (margins < eps)))
    c = suggested_c(err, below, keep)
    finite = margins[np.isfinite(margins)]
    lowest = float(finite[0]) if len(finite) else 0.0
    lower = np.where(np.isfinite(margins[:kept]), margins[:kept], np.sign(margins[:kept]) * abs(lowest))
    mean_margin = float(lower.mean())
    mean_eps = float(np.minimum(eps, c * np.maximum(margins[:kept], 0)).mean())
    return {
        "rows": rows,
        "kept": kept,
        "misclassified": err,
        "below_eps": below,
        "mislabelled_after_pruning": min(1.0, below / keep),
        "c": c,
        "residual_mislabelled": min(1.0, err * c / ((1 - c) * keep)),
        "safe_prune_fraction": max(0.0, 1 - 4 * err),
        "safe_prune_fraction_uncapped": max(0.0, 1 - 2.5 * below),
        "mean_margin": mean_margin,
        "mean_eps": mean_eps,
        "collapse_margin": mean_margin - mean_eps,
        "collapse_margin_uncapped": mean_margin - eps,
    }


def suggested_c(misclassified: float, below_eps: float, keep_fraction: float) -> float:
    """``puma-plus``'s automatic cap: ``p f / (p f + err)`` in [0.25, 0.75], and 0.75 where both shares are 0.

    Before pruning the mislabelled mass is ``p``; after pruning to ``f`` and capping at ``c`` it is
    ``err c / ((1 - c) f)``. Setting them equal gives the formula.

    >>> round(suggested_c(0.12, 0.25, 0.6), 2), suggested_c(0.0, 0.0, 0.5)
    (0.56, 0.75)
    """
    mass = below_eps * keep_fraction
    if mass + misclassified == 0:
        return 0.75
    return float(np.clip(mass / (mass + misclassified), 0.25, 0.75))
