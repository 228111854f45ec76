"""The margin table: one row per image of a pool, Parquet parts in a folder, readable without PUMA.

Columns: ``index int64, label int16, predicted int16, margin float32, status, steps int16, source``. The schema's
metadata (key ``puma``, JSON) says how the table was made: schema version, norm, mode and settings, SHA-256 of the
margin model's weights, fingerprint of the pool. Tables of other scores (``el2n-adv``, ...) have the same shape with
their own float columns in place of ``margin``, and are joined by `MarginTable.join`.
"""

from puma.margins.parts import (
    PART_ROWS,
    differences,
    part_path,
    part_paths,
    part_size,
    read_meta,
    read_part,
    write_part,
)
from puma.margins.status import STATUS_NAMES, Status
from puma.margins.table import MarginTable

__all__ = [
    "PART_ROWS",
    "STATUS_NAMES",
    "MarginTable",
    "Status",
    "differences",
    "part_path",
    "part_paths",
    "part_size",
    "read_meta",
    "read_part",
    "write_part",
]
