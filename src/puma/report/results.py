"""The results of a study as the report reads them: ``results.parquet``, row by row and arm by arm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from puma.errors import DataError
from puma.tradeoff import Group, RunKey, Setting

_TEXT = ("study", "pool", "strategy", "params", "recipe", "checkpoint")
_WHOLE = ("seed", "n_test", "kept", "steps")
_REAL = ("prune_fraction", "eps_train", "clean_accuracy", "robust_accuracy", "apgd_accuracy", "mean_eps", "attack_cost")
_MAY_BE_NULL = {"robust_accuracy", "apgd_accuracy", "params", "attack_cost"}
COLUMNS = (*_TEXT, *_WHOLE, *_REAL)


@dataclass(frozen=True)
class Result:
    """One row of ``results.parquet``: one checkpoint of one run, judged.

    Accuracies are shares in [0, 1]; ``robust_accuracy`` is AutoAttack standard or None; ``eps_train`` and ``mean_eps``
    are pixel units; ``attack_cost`` is in forward-equivalents or None.
    """

    study: str
    pool: str
    strategy: str
    params: str
    prune_fraction: float
    seed: int
    recipe: str
    checkpoint: str
    eps_train: float
    clean_accuracy: float
    robust_accuracy: float | None
    apgd_accuracy: float | None
    n_test: int
    kept: int
    mean_eps: float
    attack_cost: float | None
    steps: int

    @property
    def key(self) -> RunKey:
        """The row as `puma.tradeoff` names it."""
        group = Group(self.study, self.pool, self.recipe, self.checkpoint)
        return group, Setting(self.strategy, self.params, self.prune_fraction), self.seed

    def to_dict(self) -> dict[str, Any]:
        """The row as a mapping of the columns."""
        return {name: getattr(self, name) for name in COLUMNS}

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The strategy's parameters."""
        return dict(json.loads(self.params or "{}"))


@dataclass(frozen=True)
class Arm:
    """One way to choose data, over its seeds: everything that a row names except seed and checkpoint.

    ``label`` names it within its study: the strategy, those parameters in which arms of it differ, and the prune
    fraction where the study has several.
    """

    label: str
    rows: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """The row of the lowest seed."""
        return self.rows[0]

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return self.first.strategy

    @property
    def seeds(self) -> tuple[int, ...]:
        """Its seeds, ascending."""
        return tuple(row.seed for row in self.rows)

    def mean(self, column: str) -> float | None:
        """Mean of a column over the seeds; None if one is missing."""
        values = [getattr(row, column) for row in self.rows]
        return None if any(value is None for value in values) else sum(values) / len(values)


def read_results(path: Path | str) -> list[Result]:
    """Read ``results.parquet``.

    Raises:
        DataError: missing, no Parquet, columns missing, nulls where none belong, accuracies outside [0, 1].
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist", fix="`puma study run` makes it; `puma study status` shows how far it is"
        )
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}", why=str(error).strip()) from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{path} is not a results table", why=f"it lacks the columns {', '.join(missing)}")
    rows = [_result(values, path) for values in table.select(list(COLUMNS)).to_pylist()]
    keys = [(*_arm_key(row), row.seed, row.checkpoint) for row in rows]
    twice = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else set()
    if twice:
        raise DataError(f"{path} holds {sorted(twice)[0]} more than once", fix="`puma study run` writes it anew")
    return rows


def arms(rows: Iterable[Result], checkpoint: str = "last") -> list[Arm]:
    """The arms of a study at one checkpoint, in the order of the table, their rows by ascending seed."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for row in rows:
        if row.checkpoint == checkpoint:
            groups.setdefault(_arm_key(row), []).append(row)
    firsts = [group[0] for group in groups.values()]
    return [Arm(_label(group[0], firsts), tuple(sorted(group, key=lambda row: row.seed))) for group in groups.values()]


def _arm_key(row: Result) -> tuple[Any, ...]:
    return row.pool, row.recipe, row.strategy, row.params, row.prune_fraction


def _label(row: Result, firsts: list[Result]) -> str:
    kin = [other for other in firsts if other.strategy == row.strategy]
    names = [
        name
        for name in sorted({name for other in kin for name in other.parameters})
        if len({json.dumps(other.parameters.get(name)) for other in kin}) > 1
    ]
    parts = [f"{name}={_short(row.parameters.get(name))}" for name in names]
    if len({other.prune_fraction for other in kin}) > 1:
        parts.append(f"p={row.prune_fraction:g}")
    return f"{row.strategy} {' '.join(parts)}".strip()


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _result(values: dict[str, Any], path: Path) -> Result:
    empty = [name for name in COLUMNS if values[name] is None and name not in _MAY_BE_NULL]
    if empty:
        raise DataError(
            f"{path} has an empty {empty[0]} for {values['strategy']!r}", fix="`puma study run` writes it anew"
        )
    try:
        fields: dict[str, Any] = {name: str(values[name] or "") for name in _TEXT}
        fields |= {name: int(values[name]) for name in _WHOLE}
        fields |= {name: None if values[name] is None else float(values[name]) for name in _REAL}
        fields["params"] = json.dumps(json.loads(fields["params"] or "{}"), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} holds a value of the wrong kind", why=str(error)) from None
    for name in ("clean_accuracy", "robust_accuracy", "apgd_accuracy"):
        if fields[name] is not None and not 0 <= fields[name] <= 1:
            raise DataError(f"{path} holds {name} {fields[name]:g}", why="accuracies are shares in [0, 1]")
    return Result(**fields)
