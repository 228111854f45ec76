"""The parts of a margin table: Parquet files in a folder, each written whole or not at all, each with its checksums."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.errors import DataError
from puma.io import atomic_path
from puma.margins.status import STATUS_NAMES

SCHEMA_VERSION = "puma.margins/1"
PART_ROWS = 65_536
METADATA_KEY = b"puma"


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


def differences(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Name every setting in which two metadata differ, with both values."""
    for key in sorted({*one, *two}):
        a, b = one.get(key), two.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} and {b!r}"
