"""The results table of a study, and what lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from puma._version import __version__
from puma.report.evaluations import (
    FLAGS_FILE,
    Judged,
    evaluation_file,
    read_evaluation,
    read_flags_file,
    write_flags_file,
    write_table,
)
from puma.study.folder import StudyFolder
from puma.tradeoff import RunKey, read_runs

SCHEMA_VERSION = "puma.results/1"
MISLABELLED_VERSION = "puma.mislabelled/1"
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
_MISLABELLED = pa.schema(
    {
        "pool": _TEXT,
        "recipe": _TEXT,
        "prune_fraction": _REAL,
        "seed": _WHOLE,
        "strategy": _TEXT,
        "share": _REAL,
    },
    metadata={"schema": MISLABELLED_VERSION},
)
_JUDGED = ("pool", "recipe", "prune_fraction", "seed")


def collect(study: StudyFolder) -> list[dict[str, Any]]:
    """The rows of all finished cells, in the order of the study."""
    rows: list[dict[str, Any]] = []
    for cell in study.spec.cells():
        rows += (study.result(cell.key) or {}).get("rows", [])
    return rows


def write_results(study: StudyFolder) -> Path:
    """Write ``results.parquet``, ``mislabelled.parquet`` and ``flags.parquet`` from the finished cells.

    These three, ``study.toml`` and ``done/`` are the small files: they are all that a study needs to go on elsewhere,
    and all that its report needs for every figure and interval. Each says which version of PUMA wrote it and from
    which settings, recipes and margins, as far as they are known.
    """
    made = {"puma": __version__, "study": study.spec.name, "fingerprints": study.fingerprints}
    write_table(study.path / "results.parquet", pa.Table.from_pylist(collect(study), schema=SCHEMA), made)
    shares = []
    for cell in study.spec.cells():
        judged, rows = study.result(f"judged-{cell.key}"), (study.result(cell.key) or {}).get("rows", [])
        if judged and rows:
            shares.append({key: rows[0][key] for key in _JUDGED} | {"strategy": cell.label, "share": judged["share"]})
    if shares:
        write_table(study.path / "mislabelled.parquet", pa.Table.from_pylist(shares, schema=_MISLABELLED), made)
    if judged_images := _flags(study):
        write_flags_file(study.path / FLAGS_FILE, judged_images, made)
    return study.path / "results.parquet"


def _flags(study: StudyFolder) -> dict[RunKey, Judged]:
    """Flags of every finished cell: from its run, or, where that stayed elsewhere, from the file written before."""
    path = study.path / FLAGS_FILE
    kept = read_flags_file(path) if path.is_file() else {}
    found: dict[RunKey, Judged] = {}
    for cell in study.spec.cells():
        for entry in read_runs((study.result(cell.key) or {}).get("rows", [])):
            file = evaluation_file(study.run_folder(cell), entry.group.checkpoint)
            if file.is_file():
                found[entry.key] = read_evaluation(file)
            elif entry.key in kept:
                found[entry.key] = kept[entry.key]
    return found
