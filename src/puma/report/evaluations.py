"""Flags of single test images: beside a run's evaluation, and all of a study's in one small file.

A run's folder is large and stays where it was trained. ``flags.parquet`` in the study's folder keeps what intervals
need of it: one row per cell and checkpoint, named as in ``results.parquet``, with ``attack``, ``clean`` and ``robust``
(lists of booleans in the order of the test set, null where an image was not judged).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.io import atomic_path
from puma.tradeoff import Flags, Group, RunKey, Setting

FLAGS_FILE = "flags.parquet"

Judged = tuple[Flags, str]
"""Flags, and the attack that gave the robust ones."""

# "element": as it is read back, so that `puma verify` writes the same bytes again
_TEXT, _LIST = pa.string(), pa.list_(pa.field("element", pa.bool_()))
_SCHEMA = pa.schema(
    {
        "study": _TEXT,
        "pool": _TEXT,
        "recipe": _TEXT,
        "checkpoint": _TEXT,
        "strategy": _TEXT,
        "params": _TEXT,
        "prune_fraction": pa.float64(),
        "seed": pa.int64(),
        "attack": _TEXT,
        "clean": _LIST,
        "robust": _LIST,
    },
    metadata={"schema": "puma.flags/1"},
)


def evaluation_file(run: Path, checkpoint: str) -> Path:
    """Where the flags of one checkpoint of a run lie: those of AutoAttack standard, or of the weaker attack it had."""
    folder = run if checkpoint == "last" else run / checkpoint
    standard = folder / "evaluation.parquet"
    return standard if standard.is_file() else next(iter(sorted(folder.glob("evaluation-*.parquet"))), standard)


def read_evaluation(path: Path) -> Judged:
    """The flags beside one evaluation.

    Raises:
        OSError, ValueError, KeyError, pyarrow.ArrowException: it is broken.
    """
    table = pq.read_table(path, page_checksum_verification=True)
    meta: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"puma", b"{}"))
    clean, robust = (np.array(table[name].to_pylist(), dtype=np.float64) for name in ("clean_correct", "robust"))
    return Flags(clean, robust), str(meta.get("attack"))


def read_flags_file(path: Path) -> dict[RunKey, Judged]:
    """A study's ``flags.parquet``, by cell.

    Raises:
        OSError, ValueError, KeyError, pyarrow.ArrowException: it is broken.
    """
    found: dict[RunKey, Judged] = {}
    for row in pq.read_table(path, page_checksum_verification=True).to_pylist():
        group = Group(row["study"], row["pool"], row["recipe"], row["checkpoint"])
        key = group, Setting(row["strategy"], row["params"], row["prune_fraction"]), row["seed"]
        clean, robust = (np.array(row[name], dtype=np.float64) for name in ("clean", "robust"))
        found[key] = Flags(clean, robust), row["attack"]
    return found


def write_flags_file(path: Path, judged: Mapping[RunKey, Judged], made: Mapping[str, Any] | None = None) -> None:
    """Write a study's flags to one file; ``made`` says what they were made by and from."""
    rows = []
    for (group, setting, seed), (flags, attack) in judged.items():
        judged_images = {"attack": attack, "clean": _listed(flags.clean), "robust": _listed(flags.robust)}
        rows.append(asdict(group) | asdict(setting) | {"seed": seed} | judged_images)
    write_table(path, pa.Table.from_pylist(rows, schema=_SCHEMA), made or {})


def write_table(path: Path, table: pa.Table, made: Mapping[str, Any]) -> None:
    """Write one of a study's tables with a checksum on every page; ``made`` goes into its metadata, as JSON.

    Equal tables give equal bytes.
    """
    told = {**(table.schema.metadata or {}), b"puma": json.dumps(made, sort_keys=True).encode()}
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(told), temporary, compression="zstd", write_page_checksum=True)


def _listed(flags: Any) -> list[bool | None]:
    values: NDArray[np.float64] = np.asarray(flags, dtype=np.float64)
    return [None if np.isnan(value) else bool(value) for value in values]
