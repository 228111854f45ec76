"""What a strategy is given (`Problem`) and what it answers (`Choice`)."""

from __future__ import annotations

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
class Choice:
    """A strategy's answer.

    Args:
        keep: bool ``[N]``.
        eps: float32 ``[N]``; what it holds for dropped rows does not matter, `make_plan` sets it to 0.
        derived: numbers the rule worked out for itself, such as an automatic ``c``; kept in the plan's metadata.
        trades_weight: the TRADES weight the plan asks for, or None for the recipe's.
    """

    keep: NDArray[np.bool_]
    eps: NDArray[np.float32]
    derived: Mapping[str, Any] = field(default_factory=dict)
    trades_weight: float | None = None


@dataclass(frozen=True)
class Problem:
    """Scores, a threat model, and how many rows have to go from where.

    Args:
        table: margins (and other scores) of the pool, higher margin = easier.
        threat: the threat model of the training to come.
        quotas: the prunable rows in groups, with the number that goes from each.
        seed: for strategies that draw.
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
                fix="compute them with `puma score --from-run RUN` and give that table too",
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
            gone = extreme(scores[group.rows], group.remove, end, self.rng(1, group.code))
            keep[group.rows[gone]] = False
        return keep

    def random_scores(self) -> NDArray[np.float32]:
        """float32 ``[N]``, uniform; the same for all strategies of a seed, so that their draws can be compared."""
        return self.rng(0).random(len(self), dtype=np.float32)

    def everything(self) -> NDArray[np.bool_]:
        """Keep all rows."""
        return np.ones(len(self), dtype=bool)

    def uniform(self, eps: float | None = None) -> NDArray[np.float32]:
        """The same eps for all rows: the threat model's, or another."""
        return np.full(len(self), self.threat.eps if eps is None else eps, dtype=np.float32)


def whole(name: str, value: Any, *, low: int) -> int:
    """Check a whole number given by the user.

    Raises:
        UsageError: not a whole number, or below ``low``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UsageError(
            f"{name} = {value!r} is not a whole number from {low} on", fix=f"choose a {name} in that range"
        )
    return value


def fraction(name: str, value: Any, *, low: float = 0.0, high: float = 1.0, open_low: bool = False) -> float:
    """Check a number given by the user against a closed range (open at the lower end if ``open_low``).

    >>> fraction("c", 0.5)
    0.5

    Raises:
        UsageError: not a number, NaN, or outside the range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value <= high:
        bracket = "(" if open_low else "["
        end = f"{high:g}]" if np.isfinite(high) else "inf)"
        raise UsageError(f"{name} = {value!r} is not in {bracket}{low:g}, {end}", fix=f"choose a {name} in that range")
    return float(value)
