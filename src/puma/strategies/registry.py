"""Strategies by name, the input of one (`SelectionContext`), its output (`Selection`), and the quotas they prune by.

Every strategy prunes by the same quotas, so that strategies differ in *which* images they keep and in nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, UsageError, integer, number, unknown
from puma.margins import MarginTable, Status
from puma.threat import ThreatModel

End = Literal["high", "low"]
# Types of parameters, with the check of values that are given: a study is refused before it starts.
Positive = Annotated[float, partial(number, open_low=True)]
Share = Annotated[float, partial(number, high=1)]
Ratio = Annotated[float | None, partial(number, high=1, open_low=True)]
Count = Annotated[int, partial(integer, low=1)]


class Quota(NamedTuple):
    """The prunable rows of one source and class, and how many of them have to go."""

    code: int  # source * num_classes + class (0 for the only quota if unbalanced); it seeds the draw between ties
    rows: NDArray[np.int64]  # [n], ascending
    remove: int


def make_quotas(table: MarginTable, prune_fraction: float, *, protect_real: bool, class_balanced: bool) -> list[Quota]:
    """Split the prunable rows by source and class and give each group its exact share of the cut (see `make_plan`)."""
    groups, codes = 1, np.zeros(len(table), np.int16)
    if class_balanced:  # numpy sorts 16 bits by radix: linear time
        groups = len(table.sources) * table.num_classes
        codes = table.source.astype(np.int16 if groups <= np.iinfo(np.int16).max else np.int64)
        codes *= table.num_classes
        codes += table.label
    rows = np.flatnonzero(table.synthetic) if protect_real and table.synthetic.any() else np.arange(len(table))
    order = rows[np.argsort(codes[rows], kind="stable")]
    sizes = np.bincount(codes[order], minlength=groups)
    present = np.flatnonzero(sizes)
    sizes = sizes[present]
    parts = zip(present, sizes, np.cumsum(sizes), split_exactly(sizes, prune_fraction), strict=True)
    return [Quota(int(code), order[stop - size : stop], int(remove)) for code, size, stop, remove in parts]


def split_exactly(sizes: NDArray[np.integer[Any]], fraction: float) -> NDArray[np.int64]:
    """How many of each group make ``fraction`` of the whole, a half rounded up; equal remainders: the larger group."""
    exact = fraction * sizes.astype(np.float64)
    parts = np.floor(exact + 1e-9).astype(np.int64)
    missing = int(np.floor(fraction * float(sizes.sum()) + 0.5 + 1e-9)) - int(parts.sum())
    order = np.lexsort((np.arange(len(sizes)), -sizes, -np.round(exact - parts, 9)))
    parts[order[:missing]] += 1
    return parts


def extreme(scores: NDArray[np.float32], count: int, end: End, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark the ``count`` highest or lowest scores; equal scores at the cut are drawn at random. Linear time.

    NaN has no rank and is never marked, -inf is the lowest of all. Where fewer have a score, all of those are marked.
    """
    ranked = scores[~np.isnan(scores)]
    count = min(count, len(ranked))
    if count <= 0:
        return np.zeros(len(scores), dtype=bool)
    place = len(ranked) - count if end == "high" else count - 1
    ranked.partition(place)
    cut = ranked[place]
    marked: NDArray[np.bool_] = np.greater(scores, cut) if end == "high" else np.less(scores, cut)
    ties = np.flatnonzero(scores == cut)
    missing = count - int(np.count_nonzero(marked))
    marked[ties if missing == len(ties) else rng.choice(ties, missing, replace=False)] = True
    return marked


@dataclass(frozen=True)
class Selection:
    """The output of a strategy."""

    keep: NDArray[np.bool_]  # [N]
    eps: NDArray[np.float32]  # [N]; `make_plan` sets the values of dropped rows to 0
    derived: Mapping[str, Any] = field(default_factory=dict)  # numbers for the plan's metadata, as an automatic ``c``
    beta: float | None = None  # the TRADES weight that the plan asks for; None for the recipe's


@dataclass(frozen=True)
class SelectionContext:
    """The input of a strategy: margins (higher is easier) and other scores of a pool, and the training's threat model.

    ``quotas`` are the prunable rows in groups, with the number to remove from each; ``seed`` is for random choices.
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
        margin, absent = self.table.margin, self.table.status > Status.ESTIMATED
        if absent.any():
            margin = np.where(absent, np.float32(np.nan), margin)
        if len(margin) and np.isnan(np.fmax.reduce(margin)):
            raise DataError("no row of the table has a margin", fix="make a margin table with `puma score`")
        return margin

    def score(self, name: str) -> NDArray[np.float32]:
        """float32 ``[N]``: the score column ``name``, NaN where a row has none; `DataError` if there is no score."""
        if name not in self.table.scores:
            why = f"it has: {', '.join(sorted(self.table.scores)) or 'margins only'}"
            fix = "compute them with `puma score-run RUN` and give that table too"
            raise DataError(f"the table has no scores {name!r}", why=why, fix=fix)
        scores = np.asarray(self.table.scores[name], dtype=np.float32)
        if len(scores) and np.isnan(np.fmax.reduce(scores)):
            raise DataError(f"the scores {name!r} are all NaN")
        return scores

    def rng(self, *key: int) -> np.random.Generator:
        """A generator of the seed; another ``key`` gives another stream."""
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
    """A rule, called with a `SelectionContext` and its parameters (the keyword-only arguments), and its properties."""

    name: str
    rule: Rule
    prunes: str  # which end is removed, in a few words; empty if it removes nothing whatever prune_fraction is
    source: str  # arXiv id and section, or "our own"
    compares: bool = False  # it compares margins with eps: the table has to be in the threat model's norm
    control: bool = False  # it isolates a mechanism and is not meant for use
    needs: tuple[str, ...] = ()  # beyond labels: "margin", a score's column, "features" (a parameter)

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
        """All parameters, given or default; `UsageError` for an unknown or missing one, or a value out of its range."""
        for name in params:
            if not self.parameters:
                raise UsageError(f"strategy {self.name!r} has no parameters, {name!r} was given")
            if name not in self.parameters:
                raise unknown(f"parameter of {self.name}:", name, self.parameters)
        resolved = {**self.parameters, **params}
        if missing := [name for name, value in resolved.items() if value is inspect.Parameter.empty]:
            fix = f"add `--param {missing[0]}=VALUE`"
            raise UsageError(f"strategy {self.name!r} needs {' and '.join(missing)}", fix=fix)
        for name, kind in get_type_hints(self.rule, include_extras=True).items():
            for check in getattr(kind, "__metadata__", ()):
                value, default = resolved[name], self.parameters[name]
                if type(value) is not type(default) or value != default:  # True == 1.0, but is no number
                    resolved[name] = check(name, value)
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
