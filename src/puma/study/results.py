"""The results table of a study, and what lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma._version import __version__
from puma.study.folder import StudyFolder
from puma.tradeoff import Flags, RunKey, read_runs
from puma.tradeoff.tables import (
    FLAGS_FILE,
    MISLABELLED_FILE,
    RESULTS_FILE,
    AttackedFlags,
    write_flags,
    write_mislabelled,
)
from puma.tradeoff.tables import write_results as write_rows

_RUN = ("pool", "strategy", "params", "prune_fraction", "seed", "recipe")


def collect(study: StudyFolder) -> list[dict[str, Any]]:
    """The rows of all finished cells, in the order of the study."""
    rows: list[dict[str, Any]] = []
    for cell in study.spec.cells():
        attacked = {
            found["checkpoint"]: found for found in (study.result(f"attack-{cell.key}") or {}).get("accuracies", [])
        }
        for row in (study.result(cell.key) or {}).get("rows", []):
            rows.append({"pgd_accuracy": None, "n_pgd": 0} | row | attacked.get(row["checkpoint"], {}))
    return rows


def write_results(study: StudyFolder) -> Path:
    """Write ``results.parquet``, ``mislabelled.parquet`` and ``flags.parquet`` from the finished cells.

    These three, ``study.toml`` and ``done/`` are the small files: they are all that a study needs to go on elsewhere,
    and all that its report needs for every figure and interval. Each says which version of PUMA wrote it and from
    which settings, recipes and margins, as far as they are known.
    """
    origin = {"puma": __version__, "study": study.spec.name, "fingerprints": study.fingerprints}
    write_rows(study.path / RESULTS_FILE, collect(study), origin)
    shares = []
    for cell in study.spec.cells():
        judged, rows = study.result(f"mislabelled-{cell.key}"), (study.result(cell.key) or {}).get("rows", [])
        if judged and rows:
            shares.append({name: rows[0][name] for name in _RUN} | {"share": judged["share"]})
    if shares:
        write_mislabelled(study.path / MISLABELLED_FILE, shares, origin)
    if flags := _flags(study):
        write_flags(study.path / FLAGS_FILE, flags, origin)
    return study.path / RESULTS_FILE


def _flags(study: StudyFolder) -> list[tuple[RunKey, AttackedFlags]]:
    """Flags of every finished run and attack, as recorded in ``done/``: a run's folder may have stayed elsewhere."""
    flags: list[tuple[RunKey, AttackedFlags]] = []
    for cell in study.spec.cells():
        result, attack = study.result(cell.key) or {}, study.result(f"attack-{cell.key}") or {}
        keys = {run.group.checkpoint: run.key for run in read_runs(result.get("rows", []))}
        for entry in [*result.get("flags", []), *attack.get("flags", [])]:
            clean, attacked, robust = (_bits(entry, name) for name in ("clean_correct", "attacked", "robust"))
            robust[attacked == 0] = np.nan
            flags.append((keys[entry["checkpoint"]], (Flags(clean, robust), entry["attack"])))
    return flags


def _bits(entry: dict[str, Any], name: str) -> NDArray[np.float64]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(entry[name]), np.uint8), count=entry["images"]).astype(np.float64)
