"""Bits that no checksum guards: the footer of a Parquet file, checked by writing the same contents once more.

Margin parts and plans are written with equal bytes for equal contents. Where this library version wrote the file, a
difference is therefore damage; where another one did, nothing can be said.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from puma.errors import DataError


def check_rewritten(path: Path, write: Callable[[Path], Path]) -> None:
    """Compare ``path`` with what ``write`` writes into an empty folder.

    Raises:
        DataError: the same version of Parquet's library gives other bytes.
    """
    with tempfile.TemporaryDirectory(prefix="puma-verify-") as folder:
        again = write(Path(folder))
        try:
            same_writer = pq.read_metadata(again).created_by == pq.read_metadata(path).created_by
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is broken", why=f"its writer's name: {error}") from None
        if same_writer and again.read_bytes() != path.read_bytes():
            raise DataError(
                f"{path} is broken",
                why="its columns are whole, but writing them again gives other bytes: its footer is damaged",
            )
