"""The results table of a study, grouped into settings (one strategy with its parameters, under several seeds)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from puma.errors import DataError, unknown

BASELINE = "none"
CONTROLS = ("uniform-eps", "trades-beta")
ROBUST = ("robust_accuracy", "apgd_accuracy", "pgd_accuracy")

Results = Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""A table: columns by name, a pyarrow table, a pandas frame, or rows as mappings."""


@dataclass(frozen=True, order=True)
class Group:
    """Runs that may be compared with each other: the same study, pool, recipe and checkpoint."""

    study: str
    pool: str
    recipe: str
    checkpoint: str


@dataclass(frozen=True, order=True)
class Setting:
    """A strategy with its parameters and prune fraction, whatever the seed; ``params`` is JSON with sorted keys."""

    strategy: str
    params: str = "{}"
    prune_fraction: float = 0.0

    @property
    def label(self) -> str:
        """A short name for tables and pictures.

        >>> Setting("puma", '{"c": 0.5}', 0.3).label
        'puma c=0.5 30%'
        """
        values = json.loads(self.params)
        params = [f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in sorted(values.items())]
        share = [f"{100 * self.prune_fraction:.4g}%"] if self.prune_fraction else []
        return " ".join([self.strategy, *params, *share])

    @property
    def is_control(self) -> bool:
        """Whether the setting is itself a point of a control frontier."""
        return self.strategy in (*CONTROLS, BASELINE)


RunKey = tuple[Group, Setting, int]
"""Group, setting and seed: names one run, for per-image flags."""


@dataclass(frozen=True)
class RunResult:
    """One row of the table: one trained model. Accuracies are fractions; what the table does not say is NaN."""

    group: Group
    setting: Setting
    seed: int
    clean: float
    robust: float
    n_test: float = math.nan
    kept: float = math.nan
    mean_eps: float = math.nan
    attack_cost: float = math.nan
    steps: float = math.nan

    @property
    def key(self) -> RunKey:
        """Group, setting and seed."""
        return self.group, self.setting, self.seed


def read_runs(results: Results, robust: str = "robust_accuracy") -> list[RunResult]:
    """The runs of a results table (DESIGN's columns; of those, ``strategy, seed, clean_accuracy`` are required).

    Args:
        results: the table; a column that is absent counts as null.
        robust: which column holds the robust accuracy, one of `ROBUST`.

    Raises:
        UsageError: ``robust`` is another column.
        DataError: a required column is missing, an accuracy is outside [0, 1], or a run appears twice.
    """
    if robust not in ROBUST:
        raise unknown("robust accuracy", robust, ROBUST)
    runs: dict[RunKey, RunResult] = {}
    for row in _rows(results):
        for column in ("strategy", "seed", "clean_accuracy"):
            if row.get(column) is None:
                raise DataError(f"the results lack {column!r}", fix="give a table with the columns of results.parquet")
        run = _run(row, robust)
        for name, value in (("clean_accuracy", run.clean), (robust, run.robust)):
            if not (math.isnan(value) or 0 <= value <= 1):
                raise DataError(f"{name} {value!r} of {run.setting.label} is not in [0, 1]")
        if run.key in runs:
            raise DataError(
                f"the results hold {run.setting.label}, seed {run.seed}, twice", fix="compare one study at a time"
            )
        runs[run.key] = run
    return list(runs.values())


def by_group(runs: Iterable[RunResult]) -> dict[Group, list[RunResult]]:
    """Runs that may be compared with each other, in the order of the table."""
    groups: dict[Group, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def by_setting(runs: Iterable[RunResult]) -> dict[Setting, dict[int, RunResult]]:
    """The runs of one group by setting, then by seed."""
    settings: dict[Setting, dict[int, RunResult]] = {}
    for run in runs:
        settings.setdefault(run.setting, {})[run.seed] = run
    return settings


def _rows(results: Results) -> list[Mapping[str, Any]]:
    if hasattr(results, "to_pylist"):
        return list(results.to_pylist())
    if hasattr(results, "to_dict") and hasattr(results, "columns"):
        return list(results.to_dict("records"))
    if isinstance(results, Mapping):
        return [dict(zip(results, row, strict=True)) for row in zip(*results.values(), strict=True)]
    return list(results)


def _run(row: Mapping[str, Any], robust: str) -> RunResult:
    params = row.get("params") or "{}"
    parsed = dict(params) if isinstance(params, Mapping) else json.loads(str(params))
    setting = Setting(str(row["strategy"]), json.dumps(parsed, sort_keys=True), _number(row.get("prune_fraction"), 0.0))
    study, pool, recipe = (str(row.get(name) or "") for name in ("study", "pool", "recipe"))
    group = Group(study, pool, recipe, str(row.get("checkpoint") or "last"))
    facts = {name: _number(row.get(name)) for name in ("n_test", "kept", "mean_eps", "attack_cost", "steps")}
    clean, attacked = _number(row["clean_accuracy"]), _number(row.get(robust))
    return RunResult(group, setting, int(row["seed"]), clean, attacked, **facts)


def _number(value: Any, missing: float = math.nan) -> float:
    return missing if value is None else float(value)
