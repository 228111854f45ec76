"""The input of a strategy (`SelectionContext`) and its output (`Selection`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, UsageError
from puma.margins import MarginTable, Status
from puma.strategies.quotas import End, Quotas, extreme
from puma.threat import ThreatModel


@dataclass(frozen=True)
class Selection:
    """The output of a strategy.

    Args:
        keep: bool ``[N]``.
        eps: float32 ``[N]``; the values of dropped rows do not matter, `make_plan` sets them to 0.
        derived: numbers computed by the rule, such as an automatic ``c``; stored in the plan's metadata.
        beta: the TRADES weight the plan asks for, or None for the recipe's.
    """

    keep: NDArray[np.bool_]
    eps: NDArray[np.float32]
    derived: Mapping[str, Any] = field(default_factory=dict)
    beta: float | None = None


@dataclass(frozen=True)
class SelectionContext:
    """Scores, a threat model, and the number of rows to remove from each group.

    Args:
        table: margins (and other scores) of the pool, higher margin = easier.
        threat: the threat model of the training to come.
        quotas: the prunable rows in groups, with the number to remove from each.
        seed: for random choices.
    """

    table: MarginTable
    threat: ThreatModel
    quotas: Quotas
    seed: int

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def margin(self) -> NDArray[np.float32]:
        """float32 ``[N]``: the margin of rows that take part in rules on margins, NaN elsewhere.

        Raises:
            DataError: no row has a margin.
        """
        margin = self.table.margin
        absent = self.table.status > Status.ESTIMATED
        if absent.any():
            margin = np.where(absent, np.float32(np.nan), margin)
        if len(margin) and np.isnan(np.fmax.reduce(margin)):
            raise DataError("no row of the table has a margin", fix="make a margin table with `puma score`")
        return margin

    def score(self, name: str) -> NDArray[np.float32]:
        """float32 ``[N]``: the score column ``name`` joined to the table; NaN where a row has none.

        Raises:
            DataError: there is no such column, or it holds nothing.
        """
        if name not in self.table.scores:
            raise DataError(
                f"the table has no scores {name!r}",
                why=f"it has: {', '.join(sorted(self.table.scores)) or 'margins only'}",
                fix="compute them with `puma score-run RUN` and give that table too",
            )
        scores = np.asarray(self.table.scores[name], dtype=np.float32)
        if len(scores) and np.isnan(np.fmax.reduce(scores)):
            raise DataError(f"the scores {name!r} are all NaN")
        return scores

    def rng(self, *key: int) -> np.random.Generator:
        """A generator of the plan's seed; another ``key`` gives another stream."""
        return np.random.default_rng([self.seed, *key])

    def drop(self, scores: NDArray[np.float32], end: End) -> NDArray[np.bool_]:
        """Fill every quota from one end of ``scores`` ``[N]``; rows with NaN stay. Returns keep, bool ``[N]``."""
        keep = np.ones(len(self), dtype=bool)
        for group in self.quotas:
            removed = extreme(scores[group.rows], group.remove, end, self.rng(1, group.code))
            keep[group.rows[removed]] = False
        return keep

    def random_scores(self) -> NDArray[np.float32]:
        """float32 ``[N]``, uniform; the same for all strategies of a seed, so that their draws can be compared."""
        return self.rng(0).random(len(self), dtype=np.float32)

    def keep_all(self) -> NDArray[np.bool_]:
        """bool ``[N]``, all True."""
        return np.ones(len(self), dtype=bool)

    def uniform_eps(self, eps: float | None = None) -> NDArray[np.float32]:
        """float32 ``[N]``: the same eps for all rows, the threat model's unless given."""
        return np.full(len(self), self.threat.eps if eps is None else eps, dtype=np.float32)


def integer(name: str, value: Any, *, low: int) -> int:
    """Check an integer given by the user; numpy's integers will do.

    Raises:
        UsageError: not an integer, or below ``low``.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, (bool, np.bool_)) or value < low:
        raise UsageError(f"{name} = {value!r} is not an integer >= {low}", fix=f"choose a {name} in that range")
    return int(value)


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> float:
    """Check a number given by the user against a closed range (open at the lower end if ``open_low``).

    >>> number("c", np.float32(0.5), high=1)
    0.5

    Raises:
        UsageError: not a number, NaN, infinite, or outside the range.
    """
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not (low < value if open_low else low <= value) or not value <= high:
        bracket = "(" if open_low else "["
        end = f"{high:g}]" if math.isfinite(high) else "inf)"
        raise UsageError(f"{name} = {value!r} is not in {bracket}{low:g}, {end}", fix=f"choose a {name} in that range")
    return float(value)
