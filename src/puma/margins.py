"""The margin table: one row per image of a pool, Parquet parts in a folder, readable without PUMA.

Columns: ``index int64, label int16, predicted int16, margin float32, status, steps int16, source``. The schema's
metadata (key ``puma``, JSON) says how the table was made: schema version, norm, mode and settings, SHA-256 of the
margin model's weights, fingerprint of the pool. Tables of other scores (``el2n-adv``, ...) have the same shape with
their own float columns in place of ``margin``, and are joined by `MarginTable.join`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.errors import DataError
from puma.files import atomic_path, fingerprint
from puma.norms import Norm, parse_norm

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = "puma.margins/1"
PART_ROWS = 65_536
METADATA_KEY = b"puma"


class Status(IntEnum):
    """How a margin came about. The margin of the last three is NaN."""

    CROSSED = 0
    """The boundary was crossed, confirmed in float32 by the unmodified model."""
    MISCLASSIFIED = 1
    """Wrong from the start: the margin is minus the distance back to the label, -inf where no way back was found."""
    ESTIMATED = 2
    """A linearised estimate (rank mode); no crossing was claimed."""
    UNCONVERGED = 3
    NO_GRADIENT = 4
    NAN = 5

    @property
    def text(self) -> str:
        """The name in tables and on screens, as in ``no-gradient``."""
        return self.name.lower().replace("_", "-")


STATUS_NAMES = tuple(status.text for status in Status)


@dataclass(frozen=True)
class MarginTable:
    """Margins (and other scores) of a pool's images, in the order of the pool.

    Args:
        label: int16 ``[N]``.
        predicted: int16 ``[N]``, the margin model's class.
        margin: float32 ``[N]``, signed distance to the boundary in ``norm``, pixel units of [0, 1] images; higher is
            easier, negative is misclassified, NaN where there is none.
        status: int8 ``[N]``, codes of `Status`.
        steps: int16 ``[N]``, iterations spent.
        source: int16 ``[N]``, code into ``sources``.
        meta: how it was made; keys ``norm, mode, settings, model, pool``. ``meta["pool"]`` holds ``fingerprint``,
            ``num_classes`` and ``sources``, a list of ``{"name", "role", "rows"}`` in the order of the codes.
        scores: other float columns ``[N]`` by name, such as ``"el2n-adv"``.
    """

    label: NDArray[np.int16]
    predicted: NDArray[np.int16]
    margin: NDArray[np.float32]
    status: NDArray[np.int8]
    steps: NDArray[np.int16]
    source: NDArray[np.int16]
    meta: Mapping[str, Any]
    scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _COLUMNS.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=kind))
        columns = {name: getattr(self, name) for name in _COLUMNS} | dict(self.scores)
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"the columns of a margin table differ in length: {lengths}")
        parse_norm(self.meta["norm"])
        rows = sum(source["rows"] for source in self.sources)
        if rows != len(self):
            raise DataError(f"the table has {len(self)} rows but its sources hold {rows}")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def index(self) -> NDArray[np.int64]:
        """int64 ``[N]``: place in the pool, 0 to N-1."""
        return np.arange(len(self), dtype=np.int64)

    @property
    def norm(self) -> Norm:
        """The norm the margins are measured in."""
        return parse_norm(self.meta["norm"])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """``{"name", "role", "rows"}`` of each source, in the order of the codes in `source`."""
        return list(self.meta["pool"]["sources"])

    @property
    def num_classes(self) -> int:
        """How many classes the pool has."""
        return int(self.meta["pool"]["num_classes"])

    @property
    def synthetic(self) -> NDArray[np.bool_]:
        """bool ``[N]``: rows whose source is not real."""
        roles = np.array([source["role"] != "real" for source in self.sources], dtype=bool)
        return roles[self.source]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every column and of how they were made; changes when one bit does."""
        digest = hashlib.sha256(fingerprint(dict(self.meta)).encode())
        for name in _COLUMNS:
            digest.update(getattr(self, name).data)
        for name in sorted(self.scores):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.scores[name]).data)
        return digest.hexdigest()

    def join(self, other: MarginTable) -> MarginTable:
        """Add the scores of ``other``, a table of the same pool.

        Raises:
            DataError: the tables are of different pools.
        """
        mine, theirs = self.meta["pool"]["fingerprint"], other.meta["pool"]["fingerprint"]
        if mine != theirs:
            raise DataError(
                f"these score tables are of different pools ({mine[:12]} and {theirs[:12]})",
                fix="score the same pool for both",
            )
        return replace(self, scores={**self.scores, **other.scores})

    def write(self, folder: Path | str, part_rows: int = PART_ROWS) -> Path:
        """Write the table as parts of ``part_rows`` rows into ``folder``; each part appears whole or not at all."""
        folder = Path(folder)
        for part, start in enumerate(range(0, max(len(self), 1), part_rows)):
            write_part(folder, part, self.rows(start, min(start + part_rows, len(self))), self.meta)
        return folder

    def rows(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """The columns of rows ``start`` to ``stop``, with ``index``, as `write_part` takes them."""
        columns = {name: getattr(self, name)[start:stop] for name in _COLUMNS}
        columns |= {name: column[start:stop] for name, column in self.scores.items()}
        return {"index": np.arange(start, stop, dtype=np.int64), **columns}

    @classmethod
    def read(cls, path: Path | str) -> MarginTable:
        """Read a folder of parts, or one Parquet file, and check that it covers the pool exactly.

        Raises:
            DataError: nothing there, a foreign or broken part, parts of different tables, rows missing or twice.
        """
        paths = part_paths(path)
        meta = read_meta(paths[0])
        total = sum(source["rows"] for source in meta["pool"]["sources"])
        columns: dict[str, NDArray[Any]] = {}
        seen = np.zeros(total, dtype=bool)
        for part in paths:
            if (other := read_meta(part)) != meta:
                raise DataError(
                    f"{part} is of another table than {paths[0].name}",
                    why=_difference(meta, other),
                    fix="keep each table in a folder of its own",
                )
            values = read_part(part, meta)
            index = values.pop("index")
            if len(index) and (index.min() < 0 or index.max() >= total):
                raise DataError(f"{part} holds rows beyond the pool's {total}")
            if seen[index].any():
                raise DataError(
                    f"{part} repeats rows from {int(index[seen[index]][0])} on", fix="delete one of the parts"
                )
            seen[index] = True
            for name, value in values.items():
                columns.setdefault(name, np.empty(total, value.dtype))[index] = value
        if not seen.all():
            missing = np.flatnonzero(~seen)
            raise DataError(
                f"{path} lacks {len(missing)} of {total} rows, the first is {missing[0]}",
                why="scoring has not finished, or a part was removed",
                fix="run the same `puma score` command again: it makes only what is missing",
            )
        scores = {name: columns.pop(name) for name in list(columns) if name not in _COLUMNS}
        if "margin" not in columns:
            columns["margin"] = np.full(total, np.nan, np.float32)
        return cls(**columns, meta=meta, scores=scores)

    def to_pandas(self) -> pd.DataFrame:
        """The table as a pandas frame with readable status and source (pandas has to be installed)."""
        import pandas as pd

        names = [source["name"] for source in self.sources]
        columns = {"index": self.index, "label": self.label, "predicted": self.predicted, "margin": self.margin}
        frame = pd.DataFrame(columns | {"steps": self.steps, **self.scores})
        frame["status"] = pd.Categorical.from_codes(self.status, categories=pd.Index(STATUS_NAMES))
        frame["source"] = pd.Categorical.from_codes(self.source, categories=pd.Index(names))
        return frame


_COLUMNS = {
    "label": np.int16,
    "predicted": np.int16,
    "margin": np.float32,
    "status": np.int8,
    "steps": np.int16,
    "source": np.int16,
}


def part_path(folder: Path | str, part: int) -> Path:
    """Where part number ``part`` of a table lies."""
    return Path(folder) / f"part-{part:06d}.parquet"


def part_paths(path: Path | str) -> list[Path]:
    """The parts of a table: the Parquet files of a folder, or the file itself.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    paths = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    if not paths or not paths[0].is_file():
        raise DataError(f"no margin table at {path}", fix="make one with `puma score`")
    return paths


def write_part(folder: Path | str, part: int, columns: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Path:
    """Write one part atomically; equal columns and metadata give equal bytes.

    Args:
        folder: the table's folder.
        part: number of the part.
        columns: ``index``, and equally long columns as in `MarginTable` (``status`` and ``source`` as codes).
        meta: the table's metadata, the same for every part.
    """
    table = _arrow(columns, meta)
    target = part_path(folder, part)
    with atomic_path(target) as temporary:
        pq.write_table(table, temporary, **_PARQUET)
    return target


def part_size(columns: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> int:
    """Bytes that these rows would take as a part."""
    sink = pa.BufferOutputStream()
    pq.write_table(_arrow(columns, meta), sink, **_PARQUET)
    return int(sink.getvalue().size)


_PARQUET = {"write_page_checksum": True, "compression": "zstd"}


def _arrow(columns: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> pa.Table:
    """The columns as an Arrow table, status and source as text, with the metadata in its schema."""
    names = [source["name"] for source in meta["pool"]["sources"]]
    arrays: dict[str, pa.Array] = {}
    for name, column in columns.items():
        if name == "status":
            arrays[name] = pa.DictionaryArray.from_arrays(pa.array(column, pa.int8()), pa.array(STATUS_NAMES))
        elif name == "source":
            arrays[name] = pa.DictionaryArray.from_arrays(pa.array(column, pa.int16()), pa.array(names, pa.string()))
        else:
            arrays[name] = pa.array(column)
    text = json.dumps({"schema": SCHEMA_VERSION, **meta}, sort_keys=True, allow_nan=False)
    return pa.table(arrays).replace_schema_metadata({METADATA_KEY: text.encode()})


def read_meta(path: Path | str) -> dict[str, Any]:
    """The metadata of one part, without ``schema``.

    Raises:
        DataError: not a Parquet file, not a margin table, or of a newer schema version.
    """
    try:
        schema = pq.read_schema(path)
        meta = json.loads((schema.metadata or {})[METADATA_KEY])
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is not a margin table", why=str(error), fix="`puma show` says what a file is"
        ) from None
    version = meta.pop("schema", None)
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema {version!r}", why=f"this version reads {SCHEMA_VERSION!r}", fix="update puma-robust"
        )
    return dict(meta)


def read_part(path: Path | str, meta: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The columns of one part as numpy arrays, page checksums verified, status and source as codes.

    Raises:
        DataError: the part is broken.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is broken",
            why=str(error).strip(),
            fix="run the same `puma score` command: it redoes only this part",
        ) from None
    names = {"status": list(STATUS_NAMES), "source": [source["name"] for source in meta["pool"]["sources"]]}
    columns: dict[str, NDArray[Any]] = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        columns[name] = _codes(column, names[name]) if name in names else column.to_numpy(zero_copy_only=False)
    return columns


def _codes(column: pa.Array, names: list[str]) -> NDArray[Any]:
    """Codes of a text column in the order of ``names``, however the file happened to encode it."""
    if not isinstance(column, pa.DictionaryArray):
        column = column.dictionary_encode()
    if not len(column):
        return np.empty(0, np.int16)
    order = np.array([names.index(text) for text in column.dictionary.to_pylist()], dtype=np.int16)
    codes: NDArray[Any] = order[column.indices.to_numpy(zero_copy_only=False)]
    return codes


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Name the first settings in which two metadata differ, with both values."""
    return "; ".join(differences(one, two)) or "their metadata differ"


def differences(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Name every setting in which two metadata differ, with both values."""
    for key in sorted({*one, *two}):
        a, b = one.get(key), two.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} and {b!r}"
