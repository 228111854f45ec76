"""Which test images each run gets right, as `puma.tradeoff` takes them; only where they fit the results."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from puma.errors import DataError
from puma.report.materials import Materials
from puma.report.results import Result
from puma.tradeoff import Flags, RunKey
from puma.tradeoff.tables import evaluation_file, read_evaluation

_ATTACK_OF_COLUMN = {"robust_accuracy": "standard", "apgd_accuracy": "apgd-ce"}


def read_flags(materials: Materials, rows: Iterable[Result], column: str) -> dict[RunKey, Flags]:
    """The flags of all rows, or of none where one is missing: intervals have to be of one kind.

    Flags that do not give the accuracies in the results are named among the problems and not used.

    Args:
        materials: the study's folder.
        rows: rows of the results.
        column: the robust accuracy that is compared.
    """
    found: dict[RunKey, Flags] = {}
    for row in rows:
        flags = _flags(materials, row, column)
        if flags is None:
            return {}
        found[row.key] = flags
    lengths = {len(np.asarray(flags.clean)) for flags in found.values()}
    return found if len(lengths) == 1 else {}


def _flags(materials: Materials, row: Result, column: str) -> Flags | None:
    run = materials.run_folder(row)
    try:
        if run and (path := evaluation_file(run, row.checkpoint)).is_file():
            flags, attack = read_evaluation(path)
        elif (kept := materials.flags.get(row.key)) is not None:
            flags, attack = kept
        else:
            return None
    except DataError as error:
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
