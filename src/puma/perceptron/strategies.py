"""The strategies of `puma.strategies` on one training set of the linear task, and its theory read off real margins."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.errors import DataError, UsageError, unknown
from puma.perceptron.closed_forms import Array, within
from puma.strategies import STRATEGIES
from puma.strategies.rules import automatic_c

NAMES = ("none", "random", "difficult", "easy", "puma", "puma-plus", "cap-only", "uniform-eps")
WHOLE = ("none", "cap-only", "uniform-eps")
"""Strategies that keep every row."""


@dataclass(frozen=True)
class Strategy:
    """A strategy with its parameters: names, rules and defaults of `puma.strategies`, without classes and sources.

    ``none``: all rows, full eps. ``random``: a random share. ``difficult`` / ``easy``: the lowest / highest margins go.
    ``puma(c)``: the highest margins go, ``eps_i = min(eps, c max(m_i, 0))``. ``puma-plus(c, max_misclassified)``: first
    the most negative rows beyond that share of the kept set go, then the highest margins; ``c`` may be ``auto``.
    ``cap-only(c)``: puma's eps on all rows. ``uniform-eps(scale)``: all rows at ``scale`` times eps.

    Args:
        name: one of `NAMES`.
        parameters: in that order.

    >>> Strategy.parse("puma-plus(0.5)")
    Strategy(name='puma-plus', parameters=(0.5, 0.2))
    """

    name: str
    parameters: tuple[float | str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Read ``name`` or ``name(parameter, ...)``; what is left out takes its default.

        Raises:
            UsageError: an unknown name, too many parameters, or one out of its range.
        """
        match = re.fullmatch(r"\s*([a-z-]+)\s*(?:\((.*)\))?\s*", text)
        name = match[1] if match else text
        if name not in NAMES:
            raise unknown("strategy", name, NAMES)
        given = [part.strip() for part in (match[2] or "").split(",")] if match and match[2] else []
        defaults = _defaults(name)
        if len(given) > len(defaults):
            raise UsageError(f"strategy {text!r} has too many parameters", fix=f"{name} takes {len(defaults)}")
        values = tuple(_number(part, text) for part in given) + defaults[len(given) :]
        if "auto" in values[1:] or (values[:1] == ("auto",) and name != "puma-plus"):
            raise UsageError(f"strategy {text!r}: 'auto' is only for the c of puma-plus")
        return cls(name, values)

    def cap(self, misclassified: float, below_eps: float, keep: float) -> float:
        """The factor ``c`` of the cap; infinite for strategies without one.

        Args:
            misclassified: share of rows with a negative margin, before pruning.
            below_eps: share with a margin from 0 to eps, before pruning.
            keep: kept share.
        """
        if self.name not in ("puma", "puma-plus", "cap-only"):
            return float("inf")
        c = self.parameters[0]
        return automatic_c(misclassified, below_eps, keep) if isinstance(c, str) else c

    def select(
        self, margin: Array, eps: float, keep: float, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], Array]:
        """Choose rows and their eps.

        Args:
            margin: signed margins ``[n]`` to the probe.
            eps: of the threat model.
            keep: kept share; strategies that keep everything ignore it.
            rng: for ``random``.

        Returns:
            Indices of the kept rows, ascending, and their eps.
        """
        n = len(margin)
        kept = n if self.name in WHOLE else max(1, round(keep * n))
        start = n - kept if self.name == "difficult" else 0
        if self.name == "puma-plus":  # the most negative rows beyond its share go first, never beyond the budget
            allowed = int(float(self.parameters[1]) * kept)
            start = min(n - kept, max(0, int((margin < 0).sum()) - allowed))
        order = rng.permutation(n) if self.name == "random" else np.argsort(margin, kind="stable")
        rows = np.sort(order[start : start + kept])
        c = self.cap(float(np.mean(margin < 0)), float(np.mean((margin > 0) & (margin < eps))), kept / n)
        return rows, self.eps_of(margin[rows], eps, c)

    def eps_of(self, margin: Array, eps: float, c: float) -> Array:
        """The eps of kept rows with these margins, under a cap of factor ``c``."""
        if self.name == "uniform-eps":
            return np.full_like(margin, eps * float(self.parameters[0]))
        return np.full_like(margin, eps) if np.isinf(c) else np.minimum(eps, c * np.maximum(margin, 0))


def bridge(margin: ArrayLike, eps: float, keep_fraction: float) -> dict[str, float]:
    """Theory of the linear task for pruning a real margin table; `puma plan --explain` prints it.

    The task's ``s`` becomes the margin model's margin, so everything here is the theory of a *linear two-class student*
    applied to a network: a compass, no law. The kept rows are taken to be the ``keep_fraction`` of lowest margins,
    without quotas per class. The formulas are this project's, read off the closed forms and grids of the docs page
    "perceptron".

    Args:
        margin: float ``[N]``, signed, in the threat model's norm; NaN rows are left out, -inf is misclassified.
        eps: of the threat model, in the same units as the margin.
        keep_fraction: kept share ``f`` in (0, 1].

    Returns:
        - ``rows``: rows with a margin; ``kept``: how many of them are kept.
        - ``misclassified``: share with a margin below 0 (``err``).
        - ``below_eps``: share with a margin from 0 to ``eps`` (``p``): attacked at full eps they may be mislabelled.
        - ``mislabelled_after_pruning``: ``min(1, p / f)``, that share among the kept rows.
        - ``c``: the suggested cap, `puma.strategies.rules.automatic_c`.
        - ``residual_mislabelled``: ``err c / ((1 - c) f)``, predicted among the kept rows under this cap, at most 1.
        - ``safe_prune_fraction``: with the cap, ``1 - 4 err`` (at least 0): beyond it misclassified rows dominate.
        - ``safe_prune_fraction_uncapped``: without a cap, ``1 - 2.5 p`` (at least 0).
        - ``mean_margin``: mean over the kept rows; a -inf counts as the lowest finite margin.
        - ``mean_eps``: mean of ``min(eps, c max(margin, 0))`` over the kept rows.
        - ``collapse_margin``: ``mean_margin - mean_eps``; at or below 0 the theory predicts collapse under this cap.
        - ``collapse_margin_uncapped``: ``mean_margin - eps``, the same at full eps.

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
    c = automatic_c(err, below, keep)
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


def _defaults(name: str) -> tuple[float | str, ...]:
    return tuple(value for value in STRATEGIES[name].parameters.values() if value is not None)


def _number(part: str, text: str) -> float | str:
    """A parameter: ``auto``, or a number that is not negative."""
    if part == "auto":
        return part
    try:
        value = float(part)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"strategy {text!r}: cannot use the parameter {part!r}", fix="write a number, 0 or more")
    return value
