"""The tables of a study, and its runs in groups and settings. Written by `puma.study`, read by reports.

``results.parquet`` has a row for each run and checkpoint, ``flags.parquet`` one for each attack on them,
``mislabelled.parquet`` one for each run. All name their runs by the same columns, carry a checksum on every page and
say what wrote them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from puma.errors import DataError, unknown
from puma.io import atomic_path

BASELINE = "none"
CONTROLS = ("uniform-eps", "trades-beta")
ROBUST = ("robust_accuracy", "apgd_accuracy", "pgd_accuracy")
RESULTS_FILE, FLAGS_FILE, MISLABELLED_FILE = "results.parquet", "flags.parquet", "mislabelled.parquet"

_TEXT, _FLOAT, _INT = pa.string(), pa.float64(), pa.int64()
_RUN = {"pool": _TEXT, "strategy": _TEXT, "params": _TEXT, "prune_fraction": _FLOAT, "seed": _INT, "recipe": _TEXT}
_FLAG_LIST = pa.list_(pa.field("element", pa.bool_()))  # "element": the name that reading gives back
RESULTS = pa.schema(
    {"study": _TEXT, **_RUN, "checkpoint": _TEXT}
    | dict.fromkeys(("eps_train", "clean_accuracy", *ROBUST), _FLOAT)
    | {"n_test": _INT, "n_pgd": _INT, "kept": _INT, "mean_eps": _FLOAT, "attack_cost": _FLOAT, "steps": _INT},
    metadata={"schema": "puma.results/1"},
)
FLAGS = pa.schema(
    {"study": _TEXT, **_RUN, "checkpoint": _TEXT, "attack": _TEXT, "clean": _FLAG_LIST, "robust": _FLAG_LIST},
    metadata={"schema": "puma.flags/1"},
)
MISLABELLED = pa.schema({**_RUN, "share": _FLOAT, "by_attack": _FLOAT}, metadata={"schema": "puma.mislabelled/2"})
_NULLABLE = {*ROBUST, "params", "attack_cost"}

Results = Any
"""A table: a pyarrow table, a pandas frame, or rows as mappings."""


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
        """A short name for tables and pictures, such as ``puma c=0.5 30%``."""
        values = json.loads(self.params)
        params = [f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in sorted(values.items())]
        share = [f"{100 * self.prune_fraction:.4g}%"] if self.prune_fraction else []
        return " ".join([self.strategy, *params, *share])

    @property
    def is_control(self) -> bool:
        """Whether the setting is itself a point of a control frontier."""
        return self.strategy in (*CONTROLS, BASELINE)


RunKey = tuple[Group, Setting, int]  # and the seed


@dataclass(frozen=True)
class RunResult:
    """One row of the results: one trained model. Accuracies are fractions; what the table does not say is NaN."""

    group: Group
    setting: Setting
    seed: int
    clean: float
    robust: float
    kept: float = math.nan
    mean_eps: float = math.nan
    attack_cost: float = math.nan

    @property
    def key(self) -> RunKey:
        """Group, setting and seed."""
        return self.group, self.setting, self.seed


@dataclass(frozen=True)
class Flags:
    """Which test images a model classifies correctly, one entry per image of the test set in its order.

    ``clean`` ``[N]`` is 1 where right, 0 where wrong, NaN where not evaluated; ``robust`` ``[N]`` the same under
    attack, NaN outside the subset that was attacked.
    """

    clean: ArrayLike
    robust: ArrayLike


AttackedFlags = tuple[Flags, str]  # and the attack that gave the robust ones


def read_runs(results: Results, robust: str = "robust_accuracy") -> list[RunResult]:
    """The runs of a results table, whose robust accuracy stands in the column ``robust``, one of `ROBUST`.

    The columns ``strategy, seed, clean_accuracy`` are required; another one that is absent counts as null.

    Raises:
        UsageError: ``robust`` is another column.
        DataError: a required column is missing, an accuracy is outside [0, 1], or a run appears twice.
    """
    if robust not in ROBUST:
        raise unknown("robust accuracy", robust, ROBUST)
    runs: dict[RunKey, RunResult] = {}
    frame = hasattr(results, "to_dict")
    for row in (
        results.to_pylist() if hasattr(results, "to_pylist") else results.to_dict("records") if frame else results
    ):
        for column in ("strategy", "seed", "clean_accuracy"):
            if row.get(column) is None:
                raise DataError(f"the results lack {column!r}", fix="give a table with the columns of results.parquet")
        params = normal_params(row.get("params"), "the results table")
        names = {name: str(row.get(name) or "") for name in ("study", "pool", "recipe", "checkpoint")}
        group = Group(**names | {"checkpoint": names["checkpoint"] or "last"})
        numbers = ("prune_fraction", "clean_accuracy", robust, "kept", "mean_eps", "attack_cost")
        share, *facts = (math.nan if row.get(name) is None else float(row[name]) for name in numbers)
        setting = Setting(str(row["strategy"]), params, 0.0 if math.isnan(share) else share)
        run = RunResult(group, setting, int(row["seed"]), *facts)
        for name, value in (("clean_accuracy", run.clean), (robust, run.robust)):
            if not (math.isnan(value) or 0 <= value <= 1):
                raise DataError(f"{name} {value!r} of {run.setting.label} is not in [0, 1]")
        if run.key in runs:
            what = f"the results hold {setting.label}, seed {run.seed}, twice"
            raise DataError(what, fix="compare a study at a time")
        runs[run.key] = run
    return list(runs.values())


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """Rows of ``results.parquet``, in its order; ``params`` is JSON with sorted keys.

    Raises:
        DataError: no such table, nulls where none belong, accuracies outside [0, 1], a run twice.
    """
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist", fix="`puma study run` makes it")
    rows = _read(path, RESULTS)
    for row, name in itertools.product(rows, set(RESULTS.names) - _NULLABLE):
        if row[name] is None:
            raise DataError(f"{path} has an empty {name} for {row['strategy']!r}")
    for column in ROBUST:
        read_runs(rows, column)
    return rows


def read_mislabelled(path: Path | str) -> list[dict[str, Any]]:
    """Rows of ``mislabelled.parquet``, shares as fractions; `DataError` if it is missing or no such table."""
    return _read(path, MISLABELLED)


def read_flags(path: Path | str, attack: str | None = None) -> dict[RunKey, AttackedFlags]:
    """Flags of ``flags.parquet`` by run; `DataError` if it is missing or no such table.

    ``attack``: only the flags under this attack; None takes AutoAttack standard where a run has it, else what it has.
    """
    flags: dict[RunKey, AttackedFlags] = {}
    for row in _read(path, FLAGS):
        group = Group(row["study"], row["pool"], row["recipe"], row["checkpoint"])
        key = group, Setting(row["strategy"], row["params"], row["prune_fraction"]), row["seed"]
        if row["attack"] == attack or (attack is None and (key not in flags or row["attack"] == "standard")):
            clean, robust = (np.array(row[name], dtype=np.float64) for name in ("clean", "robust"))
            flags[key] = Flags(clean, robust), row["attack"]
    return flags


def write_flags(path: Path | str, flags: Iterable[tuple[RunKey, AttackedFlags]], origin: Mapping[str, Any]) -> None:
    """Write ``flags.parquet``: one row for each run and attack."""
    rows = []
    for (group, setting, seed), (images, attack) in flags:
        values = {name: np.asarray(getattr(images, name), np.float64) for name in ("clean", "robust")}
        known = {name: [None if np.isnan(hit) else bool(hit) for hit in hits] for name, hits in values.items()}
        rows.append(asdict(group) | asdict(setting) | {"seed": seed, "attack": attack} | known)
    write_table(path, FLAGS, rows, origin)


def write_table(
    path: Path | str, schema: pa.Schema, rows: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]
) -> None:
    """Write rows of `RESULTS`, `FLAGS` or `MISLABELLED`; equal rows give equal bytes.

    ``origin`` says what made them and goes into the metadata.
    """
    metadata = {**schema.metadata, b"puma": json.dumps(origin, sort_keys=True).encode()}
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(metadata))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def normal_params(text: str | None, origin: Path | str) -> str:
    """JSON of a strategy's parameters with sorted keys; `DataError` if it is no JSON object."""
    try:
        return json.dumps(dict(json.loads(text or "{}")), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{origin} holds params {text!r}", why="it has to be a JSON object") from None


def _read(path: Path | str, schema: pa.Schema) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}", why=str(error).strip()) from None
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise DataError(f"{path} is not such a table", why=f"it lacks the columns {', '.join(missing)}")
    rows = table.select(schema.names).to_pylist()
    return [row | {"params": normal_params(row["params"], path)} for row in rows]
