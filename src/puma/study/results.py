"""The results table of a study, and what lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puma._version import __version__
from puma.study.folder import StudyFolder
from puma.tradeoff import RunKey, read_runs
from puma.tradeoff.tables import (
    FLAGS_FILE,
    MISLABELLED_FILE,
    RESULTS_FILE,
    AttackedFlags,
    evaluation_file,
    read_evaluation,
    read_flags,
    write_flags,
    write_mislabelled,
)
from puma.tradeoff.tables import write_results as write_rows

_RUN = ("pool", "strategy", "params", "prune_fraction", "seed", "recipe")


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
    origin = {"puma": __version__, "study": study.spec.name, "fingerprints": study.fingerprints}
    write_rows(study.path / RESULTS_FILE, collect(study), origin)
    shares = []
    for cell in study.spec.cells():
        judged, rows = study.result(f"judged-{cell.key}"), (study.result(cell.key) or {}).get("rows", [])
        if judged and rows:
            shares.append({name: rows[0][name] for name in _RUN} | {"share": judged["share"]})
    if shares:
        write_mislabelled(study.path / MISLABELLED_FILE, shares, origin)
    if flags := _flags(study):
        write_flags(study.path / FLAGS_FILE, flags, origin)
    return study.path / RESULTS_FILE


def _flags(study: StudyFolder) -> dict[RunKey, AttackedFlags]:
    """Flags of every finished cell: from its run, or, where that stayed elsewhere, from the file written before."""
    path = study.path / FLAGS_FILE
    kept = read_flags(path) if path.is_file() else {}
    flags: dict[RunKey, AttackedFlags] = {}
    for cell in study.spec.cells():
        for run in read_runs((study.result(cell.key) or {}).get("rows", [])):
            file = evaluation_file(study.run_folder(cell), run.group.checkpoint)
            if file.is_file():
                flags[run.key] = read_evaluation(file)
            elif run.key in kept:
                flags[run.key] = kept[run.key]
    return flags
