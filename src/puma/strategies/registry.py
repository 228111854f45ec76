"""Strategies by name, the input of one (`SelectionContext`) and its output (`Selection`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, UsageError, unknown
from puma.margins import MarginTable, Status
from puma.strategies.quotas import End, Quota, extreme
from puma.threat import ThreatModel


@dataclass(frozen=True)
class Selection:
    """The output of a strategy.

    Args:
        keep: bool ``[N]``.
        eps: float32 ``[N]``; `make_plan` sets the values of dropped rows to 0.
        derived: numbers computed by the rule, such as an automatic ``c``; stored in the plan's metadata.
        beta: the TRADES weight the plan asks for, or None for the recipe's.
    """

    keep: NDArray[np.bool_]
    eps: NDArray[np.float32]
    derived: Mapping[str, Any] = field(default_factory=dict)
    beta: float | None = None


@dataclass(frozen=True)
class SelectionContext:
    """The input of a strategy: scores of a pool, a threat model, and the number of rows to remove from each group.

    Args:
        table: margins (and other scores) of the pool, higher margin = easier.
        threat: the threat model of the training to come.
        quotas: the prunable rows in groups, with the number to remove from each.
        seed: for random choices.
    """

    table: MarginTable
    threat: ThreatModel
    quotas: Sequence[Quota]
    seed: int

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def margin(self) -> NDArray[np.float32]:
        """float32 ``[N]``: margins, NaN in rows that take no part; `DataError` if no row has one."""
        margin = self.table.margin
        absent = self.table.status > Status.ESTIMATED
        if absent.any():
            margin = np.where(absent, np.float32(np.nan), margin)
        if len(margin) and np.isnan(np.fmax.reduce(margin)):
            raise DataError("no row of the table has a margin", fix="make a margin table with `puma score`")
        return margin

    def score(self, name: str) -> NDArray[np.float32]:
        """float32 ``[N]``: the score column ``name``, NaN where a row has none; `DataError` if there is no score."""
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
        keep = self.keep_all()
        for code, rows, remove in self.quotas:
            keep[rows[extreme(scores[rows], remove, end, self.rng(1, code))]] = False
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


Rule = Callable[..., Selection]


@dataclass(frozen=True)
class Strategy:
    """A rule and its properties.

    Args:
        name: as users write it, ``puma-plus``.
        rule: ``rule(context, **params) -> Selection``; its keyword-only arguments are the parameters.
        prunes: which end is removed, in a few words; empty if it removes nothing whatever prune_fraction is.
        source: arXiv id and section, or "our own".
        compares: it compares margins with eps, so the table has to be in the threat model's norm.
        control: it isolates a mechanism and is not meant for use.
        beyond_eps: it may give an eps above the threat model's.
        needs: what it reads beyond labels: "margin", a score's column, or "features" (a parameter).
    """

    name: str
    rule: Rule
    prunes: str
    source: str
    compares: bool = False
    control: bool = False
    beyond_eps: bool = False
    needs: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (inspect.getdoc(self.rule) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter names and their defaults."""
        signature = inspect.signature(self.rule).parameters.values()
        return {item.name: item.default for item in signature if item.kind is item.KEYWORD_ONLY}

    def resolve(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters: those given, and the defaults of the others; `UsageError` for an unknown or a missing one."""
        for name in params:
            if not self.parameters:
                raise UsageError(f"strategy {self.name!r} has no parameters, {name!r} was given")
            if name not in self.parameters:
                raise unknown(f"parameter of {self.name}:", name, self.parameters)
        resolved = {**self.parameters, **params}
        if missing := [name for name, value in resolved.items() if value is inspect.Parameter.empty]:
            what = f"strategy {self.name!r} needs {' and '.join(missing)}"
            raise UsageError(what, fix=f"add `--param {missing[0]}=VALUE`")
        return resolved


STRATEGIES: dict[str, Strategy] = {}


def strategy(name: str, *, prunes: str, source: str, **facts: Any) -> Callable[[Rule], Rule]:
    """Register the decorated rule under ``name``; the arguments are those of `Strategy`."""

    def register(rule: Rule) -> Rule:
        STRATEGIES[name] = Strategy(name, rule, prunes, source, **facts)
        return rule

    return register


def names() -> list[str]:
    """All strategies, in alphabetical order."""
    return sorted(STRATEGIES)


def get_strategy(name: str) -> Strategy:
    """The strategy called ``name``; `UsageError` names the nearest if there is none."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    return STRATEGIES[name]
