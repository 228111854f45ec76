"""The results table of a study, and what lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from puma.files import atomic_path
from puma.study.folder import StudyFolder

SCHEMA_VERSION = "puma.results/1"
_JUDGED = ("pool", "prune_fraction", "seed")
_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int64()
SCHEMA = pa.schema(
    {
        "study": _TEXT,
        "pool": _TEXT,
        "strategy": _TEXT,
        "params": _TEXT,
        "prune_fraction": _REAL,
        "seed": _WHOLE,
        "recipe": _TEXT,
        "checkpoint": _TEXT,
        "eps_train": _REAL,
        "clean_accuracy": _REAL,
        "robust_accuracy": _REAL,
        "apgd_accuracy": _REAL,
        "n_test": _WHOLE,
        "kept": _WHOLE,
        "mean_eps": _REAL,
        "attack_cost": _REAL,
        "steps": _WHOLE,
    },
    metadata={"schema": SCHEMA_VERSION},
)


def collect(study: StudyFolder) -> list[dict[str, Any]]:
    """The rows of all finished cells, in the order of the study."""
    rows: list[dict[str, Any]] = []
    for cell in study.spec.cells():
        rows += (study.result(cell.key) or {}).get("rows", [])
    return rows


def write_results(study: StudyFolder) -> Path:
    """Write ``results.parquet`` and ``mislabelled.parquet`` from the finished cells."""
    _write(study.path / "results.parquet", pa.Table.from_pylist(collect(study), schema=SCHEMA))
    shares = []
    for cell in study.spec.cells():
        judged, rows = study.result(f"judged-{cell.key}"), (study.result(cell.key) or {}).get("rows", [])
        if judged and rows:
            shares.append({key: rows[0][key] for key in _JUDGED} | {"strategy": cell.label, "share": judged["share"]})
    if shares:
        _write(study.path / "mislabelled.parquet", pa.Table.from_pylist(shares))
    return study.path / "results.parquet"


def _write(target: Path, table: pa.Table) -> None:
    with atomic_path(target) as temporary:
        pq.write_table(table, temporary)
