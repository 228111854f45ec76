"""The results table of a study, and the tables beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma._version import __version__
from puma.study.folder import StudyFolder
from puma.study.status import result_row
from puma.tradeoff import Flags, RunKey, read_runs
from puma.tradeoff import results as tables

_RUN = ("pool", "strategy", "params", "prune_fraction", "seed", "recipe")


def collect(study: StudyFolder) -> list[dict[str, Any]]:
    """The rows of all finished runs, in the order of the study."""
    rows = []
    for run in study.spec.runs():
        if (result := study.result(run.key)) is not None:
            rows += [result_row(study, run, place) for place in range(len(result["rows"]))]
    return rows


def write_results(study: StudyFolder) -> Path:
    """Write ``results.parquet``, ``mislabelled.parquet`` and ``flags.parquet`` from the finished runs.

    These three, ``study.toml``, ``recipes/`` and ``done/`` are the small files: all that a study needs to go on
    elsewhere, and all that its report needs for every figure and interval. Each says which version of PUMA wrote it and
    from which settings, recipes and margins.
    """
    origin = {"puma": __version__, "study": study.spec.name, "fingerprints": study.fingerprints}
    tables.write_table(study.path / tables.RESULTS_FILE, tables.RESULTS, collect(study), origin)
    shares, flags = [], list[tuple[RunKey, tables.AttackedFlags]]()
    for run in study.spec.runs():
        if (result := study.result(run.key)) is None:
            continue
        if (mislabelled := study.result(f"mislabelled-{run.key}")) is not None:
            shares.append(
                {name: result["rows"][0][name] for name in _RUN}
                | {name: mislabelled[name] for name in ("share", "by_attack")}
            )
        keys = {found.group.checkpoint: found.key for found in read_runs(result["rows"])}
        for entry in [*result.get("flags", []), *(study.result(f"attack-{run.key}") or {}).get("flags", [])]:
            clean, attacked, robust = (_bits(entry, name) for name in ("clean_correct", "attacked", "robust"))
            robust[attacked == 0] = np.nan
            flags.append((keys[entry["checkpoint"]], (Flags(clean, robust), entry["attack"])))
    if shares:
        tables.write_table(study.path / tables.MISLABELLED_FILE, tables.MISLABELLED, shares, origin)
    if flags:
        tables.write_flags(study.path / tables.FLAGS_FILE, flags, origin)
    return study.path / tables.RESULTS_FILE


def _bits(entry: dict[str, Any], name: str) -> NDArray[np.float64]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(entry[name]), np.uint8), count=entry["images"]).astype(np.float64)
