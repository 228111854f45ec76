"""Which test images each run gets right, from the flags beside its evaluation, as `puma.tradeoff` takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puma.report.materials import Materials
from puma.report.results import Result
from puma.tradeoff import CellKey, Flags

_ATTACK_OF_COLUMN = {"robust_accuracy": "standard", "apgd_accuracy": "apgd-ce"}


def read_flags(materials: Materials, rows: Iterable[Result], column: str) -> dict[CellKey, Flags]:
    """The flags of all rows, or of none where one is missing: intervals have to be of one kind.

    Flags that do not give the accuracies in the results are named among the problems and not used.

    Args:
        materials: the study's folder.
        rows: rows of the results.
        column: the robust accuracy that is compared.
    """
    found: dict[CellKey, Flags] = {}
    for row in rows:
        flags = _flags(materials, row, column)
        if flags is None:
            return {}
        found[row.key] = flags
    lengths = {len(np.asarray(flags.clean)) for flags in found.values()}
    return found if len(lengths) == 1 else {}


def _flags(materials: Materials, row: Result, column: str) -> Flags | None:
    run = materials.run_folder(row)
    path = run / ("." if row.checkpoint == "last" else row.checkpoint) / "evaluation.parquet" if run else None
    if path is None or not path.is_file():
        return None
    try:
        flags, attack = _read(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        materials.problems.append(f"flags of {row.strategy}, seed {row.seed}: {error}")
        return None
    expected = [(flags.clean, row.clean_accuracy), (flags.robust, getattr(row, column))]
    if attack != _ATTACK_OF_COLUMN[column]:
        return None
    if any(value is None or abs(float(np.nanmean(np.asarray(flag))) - value) > 1e-9 for flag, value in expected):
        problem = f"flags of {row.strategy}, seed {row.seed}: they do not give the accuracies in the results"
        materials.problems.append(problem)
        return None
    return flags


def _read(path: Path) -> tuple[Flags, str]:
    table = pq.read_table(path, page_checksum_verification=True)
    meta: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"puma", b"{}"))
    clean, robust = (np.array(table[name].to_pylist(), dtype=np.float64) for name in ("clean_correct", "robust"))
    if not np.isfinite(robust).any():
        robust = np.full(len(robust), np.nan)
    return Flags(clean, robust), str(meta.get("attack"))
