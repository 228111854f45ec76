"""Pieces of a test set: fixed rows, a flag for every image, written after each attack.

A piece's file is rewritten atomically when one more attack has been through it, so that a process killed at any
moment loses at most one attack on one piece.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.errors import DataError
from puma.io import atomic_path

SCHEMA = "puma.evaluation.piece/1"
METADATA_KEY = b"puma"
CLEAN = "clean"


@dataclass
class Piece:
    """The state of one piece.

    Args:
        number: place among the pieces.
        rows: int64 ``[B]``, rows of the test set.
        label: int64 ``[B]``.
        broken_by: object ``[B]``: None while the image stands, ``"clean"`` where it was misclassified from the start,
            else the name of the attack that broke it.
        log: one entry for each finished attack, with counts and cost.
        flags: AutoAttack's warnings, counted.
    """

    number: int
    rows: NDArray[np.int64]
    label: NDArray[np.int64]
    broken_by: NDArray[np.object_]
    log: list[dict[str, Any]] = field(default_factory=list)
    flags: Counter[str] = field(default_factory=Counter)

    @property
    def robust(self) -> NDArray[np.bool_]:
        """bool ``[B]``: stands after the attacks so far."""
        return np.array([name is None for name in self.broken_by], dtype=bool)

    @classmethod
    def new(
        cls, number: int, rows: NDArray[np.int64], label: NDArray[np.int64], clean_correct: NDArray[np.bool_]
    ) -> Piece:
        """A piece that no attack has seen."""
        broken_by = np.full(len(rows), None, dtype=object)
        broken_by[~clean_correct] = CLEAN
        return cls(number, rows, label, broken_by)


def piece_path(folder: Path, number: int) -> Path:
    """Where piece ``number`` lies."""
    return folder / f"piece-{number:06d}.parquet"


def write_piece(folder: Path | None, piece: Piece, identity: str) -> None:
    """Write the state of a piece atomically; ``identity`` is the fingerprint of the evaluation's settings."""
    if folder is None:
        return
    table = flag_columns(piece.rows, piece.label, piece.broken_by)
    meta = {"schema": SCHEMA, "identity": identity, "log": piece.log, "flags": dict(piece.flags)}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(meta, allow_nan=False).encode()})
    with atomic_path(piece_path(folder, piece.number)) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def flag_columns(rows: NDArray[np.int64], label: NDArray[np.int64], broken_by: NDArray[np.object_]) -> pa.Table:
    """The columns that users read: index, label, clean_correct, robust, broken_by."""
    correct = np.array([name != CLEAN for name in broken_by], dtype=bool)
    robust = np.array([name is None for name in broken_by], dtype=bool)
    return pa.table(
        {
            "index": pa.array(rows, pa.int64()),
            "label": pa.array(label, pa.int16()),
            "clean_correct": pa.array(correct),
            "robust": pa.array(robust),
            "broken_by": pa.array(list(broken_by), pa.string()),
        }
    )


def read_piece(folder: Path | None, number: int, rows: NDArray[np.int64], identity: str) -> Piece | None:
    """The piece as it was left, or None where there is none, or it is broken or of other settings (then it is redone).

    Settings are compared before, by the evaluation's own file; a foreign piece can only be a leftover.
    """
    if folder is None or not piece_path(folder, number).is_file():
        return None
    try:
        table = pq.read_table(piece_path(folder, number), page_checksum_verification=True)
        meta = json.loads((table.schema.metadata or {})[METADATA_KEY])
        if meta["schema"] != SCHEMA or meta["identity"] != identity:
            return None
        if not np.array_equal(table["index"].to_numpy(), rows):
            raise DataError(f"{piece_path(folder, number)} holds other rows than its number says")
        broken_by = np.array(table["broken_by"].to_pylist(), dtype=object)
        return Piece(
            number, rows, table["label"].to_numpy().astype(np.int64), broken_by, meta["log"], Counter(meta["flags"])
        )
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None


def split_rows(rows: NDArray[np.int64], piece_rows: int) -> list[NDArray[np.int64]]:
    """Cut ``rows`` into pieces of ``piece_rows``; the last may be shorter."""
    return [rows[start : start + piece_rows] for start in range(0, len(rows), piece_rows)]
