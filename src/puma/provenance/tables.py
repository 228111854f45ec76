"""The parts of one margin table: every part of the same table, every row once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, PumaError
from puma.io import fingerprint, read_json
from puma.margins import MarginTable, differences, part_paths, read_meta, read_part, write_part
from puma.provenance.rewriting import check_rewritten

_RECORD = "table.json"
_NAMED = 5


def check_table(folder: Path, bad: Collection[Path] = ()) -> tuple[list[PumaError], dict[str, Any]]:
    """Check a folder of parts; list everything that is wrong with it, part by part.

    Args:
        folder: where the parts lie.
        bad: parts that are known to be broken already, and are not listed again.

    Returns:
        (problems, facts): facts hold ``fingerprint`` (of a whole table), ``pool`` and ``model``.
    """
    problems: list[PumaError] = []
    metas = {}
    paths = part_paths(folder)
    for path in paths:
        if path in bad:
            continue
        try:
            metas[path] = read_meta(path)
        except DataError as error:
            problems.append(error)
    if not metas:
        return problems, {}
    meta = _common_meta(folder, list(metas.values()))
    rows = sum(source["rows"] for source in meta["pool"]["sources"])
    seen = np.zeros(rows, dtype=bool)
    for path, own in metas.items():
        try:
            _check_part(path, own, meta, seen)
        except DataError as error:
            problems.append(error)
    if not problems and len(metas) == len(paths) and not seen.all():
        missing = np.flatnonzero(~seen)
        problems.append(
            DataError(
                f"{folder} lacks {len(missing):,} of {rows:,} rows, the first is {missing[0]:,}",
                why="scoring has not finished, or a part was removed",
                fix="run the same `puma score` command again: it makes only what is missing",
            )
        )
    facts = {"pool": meta["pool"]["fingerprint"], "model": (meta.get("model") or {}).get("sha256")}
    if not problems and len(metas) == len(paths):
        facts["fingerprint"] = MarginTable.read(folder).fingerprint
    return problems, facts


def joined_fingerprints(folders: Collection[Path]) -> set[str]:
    """The fingerprints of whole tables joined with score tables of the same pool, as a plan may name them."""
    found: set[str] = set()
    tables = [MarginTable.read(folder) for folder in folders]
    for table in tables:
        pool = table.meta["pool"]["fingerprint"]
        others = [other for other in tables if other is not table and other.meta["pool"]["fingerprint"] == pool]
        for size in range(1, len(others) + 1):
            found |= {reduce(MarginTable.join, chosen, table).fingerprint for chosen in combinations(others, size)}
    return found


def _common_meta(folder: Path, metas: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table is: as recorded beside the parts, else as most parts say."""
    record = folder / _RECORD
    if record.is_file():
        known = read_json(record).get("meta")
        if isinstance(known, dict) and "pool" in known:
            return known
    most = Counter(fingerprint(meta) for meta in metas).most_common(1)[0][0]
    return next(meta for meta in metas if fingerprint(meta) == most)


def _check_part(path: Path, own: dict[str, Any], meta: dict[str, Any], seen: NDArray[np.bool_]) -> None:
    if changed := list(differences(own, meta)):
        raise DataError(f"{path} is of another table than its neighbours", why="; ".join(changed[:_NAMED]))
    columns = read_part(path, own)
    index = columns["index"]
    if len(index) and (index.min() < 0 or index.max() >= len(seen)):
        raise DataError(f"{path} holds rows beyond the pool's {len(seen):,}")
    if seen[index].any() or len(np.unique(index)) != len(index):
        raise DataError(f"{path} repeats rows", fix="delete one of the parts and score again")
    seen[index] = True
    check_rewritten(path, lambda empty: write_part(empty, 0, columns, own))
