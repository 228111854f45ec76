"""Parquet tables of a study: results, per-image flags, mislabelled shares. Written by `puma.study`, read by reports.

| file | one row per | holds |
|---|---|---|
| ``results.parquet`` | run and checkpoint | accuracies, eps, images kept, cost |
| ``flags.parquet`` | run and checkpoint | which test images are right, clean and attacked |
| ``mislabelled.parquet`` | run | shares of perturbed training images that a reference model gives another class |

All three name their runs by the same columns, carry a checksum on every page and say what wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from puma.errors import DataError
from puma.io import atomic_path
from puma.tradeoff.intervals import Flags
from puma.tradeoff.results import ROBUST, Group, RunKey, Setting, read_runs

RESULTS_FILE, FLAGS_FILE, MISLABELLED_FILE = "results.parquet", "flags.parquet", "mislabelled.parquet"

_TEXT, _FLOAT, _INT = pa.string(), pa.float64(), pa.int64()
_RUN = {"pool": _TEXT, "strategy": _TEXT, "params": _TEXT, "prune_fraction": _FLOAT, "seed": _INT, "recipe": _TEXT}
_FLAG_LIST = pa.list_(pa.field("element", pa.bool_()))  # "element": the name that reading gives back
RESULTS = pa.schema(
    {
        "study": _TEXT,
        **_RUN,
        "checkpoint": _TEXT,
        "eps_train": _FLOAT,
        "clean_accuracy": _FLOAT,
        "robust_accuracy": _FLOAT,
        "apgd_accuracy": _FLOAT,
        "pgd_accuracy": _FLOAT,
        "n_test": _INT,
        "n_pgd": _INT,
        "kept": _INT,
        "mean_eps": _FLOAT,
        "attack_cost": _FLOAT,
        "steps": _INT,
    },
    metadata={"schema": "puma.results/1"},
)
FLAGS = pa.schema(
    {"study": _TEXT, **_RUN, "checkpoint": _TEXT, "attack": _TEXT, "clean": _FLAG_LIST, "robust": _FLAG_LIST},
    metadata={"schema": "puma.flags/1"},
)
MISLABELLED = pa.schema({**_RUN, "share": _FLOAT, "by_attack": _FLOAT}, metadata={"schema": "puma.mislabelled/2"})
_NULLABLE = {*ROBUST, "params", "attack_cost"}

AttackedFlags = tuple[Flags, str]
"""Flags, and the attack that gave the robust ones."""


def read_results(path: Path | str) -> list[dict[str, Any]]:
    """Rows of ``results.parquet``, in its order; ``params`` is JSON with sorted keys.

    Raises:
        DataError: missing, not Parquet, columns missing, nulls where none belong, accuracies outside [0, 1], a run
            twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path} does not exist", fix="`puma study run` makes it; `puma study status` shows how far it is"
        )
    rows = _read(path, RESULTS.names)
    for row in rows:
        for name in RESULTS.names:
            if row[name] is None and name not in _NULLABLE:
                raise DataError(
                    f"{path} has an empty {name} for {row['strategy']!r}", fix="`puma study run` writes it anew"
                )
        row["params"] = normal_params(row["params"], path)
    for column in ROBUST:
        read_runs(rows, column)
    return rows


def write_results(path: Path | str, rows: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]) -> None:
    """Write ``results.parquet``; ``origin`` says what made it and goes into the metadata."""
    _write(Path(path), RESULTS, rows, origin)


def read_mislabelled(path: Path | str) -> list[dict[str, Any]]:
    """Rows of ``mislabelled.parquet``; ``share`` and ``by_attack`` are fractions in [0, 1].

    Raises:
        DataError: missing, not Parquet, columns missing.
    """
    rows = _read(Path(path), MISLABELLED.names)
    return [row | {"params": normal_params(row["params"], path)} for row in rows]


def write_mislabelled(path: Path | str, rows: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]) -> None:
    """Write ``mislabelled.parquet``."""
    _write(Path(path), MISLABELLED, rows, origin)


def read_flags(path: Path | str, attack: str | None = None) -> dict[RunKey, AttackedFlags]:
    """Flags of ``flags.parquet`` by run.

    Args:
        path: the file.
        attack: only the flags under this attack; None takes AutoAttack standard where a run has it, else what it has.

    Raises:
        DataError: missing, not Parquet, columns missing.
    """
    flags: dict[RunKey, AttackedFlags] = {}
    for row in _read(Path(path), FLAGS.names):
        group = Group(row["study"], row["pool"], row["recipe"], row["checkpoint"])
        setting = Setting(row["strategy"], normal_params(row["params"], path), row["prune_fraction"])
        key = group, setting, row["seed"]
        if row["attack"] == attack or (attack is None and (key not in flags or row["attack"] == "standard")):
            clean, robust = (np.array(row[name], dtype=np.float64) for name in ("clean", "robust"))
            flags[key] = Flags(clean, robust), row["attack"]
    return flags


def write_flags(path: Path | str, flags: Iterable[tuple[RunKey, AttackedFlags]], origin: Mapping[str, Any]) -> None:
    """Write ``flags.parquet``: one row for each run and attack."""
    rows = [
        asdict(group)
        | asdict(setting)
        | {"seed": seed, "attack": attack, "clean": _nullable(images.clean), "robust": _nullable(images.robust)}
        for (group, setting, seed), (images, attack) in flags
    ]
    _write(Path(path), FLAGS, rows, origin)


def normal_params(text: str | None, origin: Path | str) -> str:
    """JSON of a strategy's parameters with sorted keys.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        return json.dumps(dict(json.loads(text or "{}")), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{origin} holds params {text!r}", why="it has to be a JSON object") from None


def _table(path: Path, columns: list[str]) -> pa.Table:
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}", why=str(error).strip()) from None
    if missing := [name for name in columns if name not in table.column_names]:
        raise DataError(f"{path} is not such a table", why=f"it lacks the columns {', '.join(missing)}")
    return table


def _read(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    return list(_table(path, columns).select(columns).to_pylist())


def _write(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]], origin: Mapping[str, Any]) -> None:
    """Write rows with a checksum on every page; equal rows give equal bytes."""
    metadata = {**schema.metadata, b"puma": json.dumps(origin, sort_keys=True).encode()}
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(metadata))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def _nullable(flags: ArrayLike) -> list[bool | None]:
    values: NDArray[np.float64] = np.asarray(flags, dtype=np.float64)
    return [None if np.isnan(value) else bool(value) for value in values]
