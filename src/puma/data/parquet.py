"""Parquet in the Hugging Face layout: ``label``, and ``img`` or ``image`` with encoded files (binary, or a struct)."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puma.data.checks import check_labels, chosen_label
from puma.data.images import EncodedImages
from puma.data.source import Options, Source
from puma.errors import DataError, PumaError
from puma.io import sha256_file

_IMAGE_COLUMNS = ("img", "image", "images")
_BOMB_RATIO, _BOMB_SIZE = 100, 64 << 20
_HELD = 512 << 20


def load_parquet(path: Path, options: Options) -> Source:
    """Open one Parquet file of images and labels; images are decoded when they are read.

    The fingerprint is of the footer; ``verify="full"`` compares page checksums and fingerprints every byte.
    """
    options.only(path, "label")
    full = options.verify == "full"
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
            if image is None:
                fix = "`puma show` says what it is; images are encoded files in a column img or image"
                raise DataError(f"{path} has no column 'img'", why=f"it has: {', '.join(schema.names)}", fix=fix)
            class_names = _class_names(schema.metadata or {})
            whole = (field.name for field in schema if pa.types.is_integer(field.type) and "label" in field.name)
            label = chosen_label(schema.names, {*whole, *class_names}, options.label, str(path))
            _check_sizes(path, metadata)
            labels = file.read(columns=[label]).column(0).combine_chunks()
        files = _ColumnBytes(path, image, full)
    except PumaError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # damaged text in the footer is a UnicodeDecodeError
        raise DataError(f"{path} is not a readable Parquet file", why=str(error)[:200]) from None
    if not len(labels):
        raise DataError(f"{path} holds no rows")
    if labels.null_count or not pa.types.is_integer(labels.type):
        seen = f"{labels.type}, {labels.null_count} missing"
        raise DataError(f"{path}: {label} is {seen}", why="labels are class numbers")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{path}: {image} is {kind}", why="images are encoded files: binary, or a struct with bytes")
    names = class_names.get(label) or class_names.get("") or None
    values = check_labels(labels.to_numpy(zero_copy_only=False), metadata.num_rows, f"{path}: {label}", names)
    images = EncodedImages(files, len(values), options)
    fingerprint = sha256_file(path) if full else _footer_hash(path, metadata.serialized_size)
    return Source(images, values, name=path.stem, fingerprint=fingerprint, class_names=names)


class _ColumnBytes:
    """The values of a binary column (or of a struct's ``bytes``) by row group; those read last stay, up to 512 MiB."""

    def __init__(self, path: Path, column: str, checksums: bool) -> None:
        self._settings = (path, column, checksums)
        self._file = pq.ParquetFile(path, page_checksum_verification=checksums)
        groups = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._groups: OrderedDict[int, pa.Array] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _ColumnBytes, self._settings

    def __call__(self, row: int) -> tuple[Any, str]:
        """The bytes of a row, and what to call it in messages; `DataError` for a damaged row group or no bytes."""
        path, column, _ = self._settings
        number = int(np.searchsorted(self._ends, row, side="right"))
        group = self._group(number)
        value, where = group[row - int(self._ends[number]) + len(group)], f"{path}: {column}, row {row:,}"
        if not value.is_valid:
            raise DataError(f"{where} holds no bytes")
        return value.as_buffer(), where

    def _group(self, number: int) -> pa.Array:
        path, name, _ = self._settings
        with self._lock:
            if number not in self._groups:
                try:
                    column = self._file.read_row_group(number, columns=[name]).column(0).combine_chunks()
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise DataError(f"{path} is damaged in row group {number}", why=str(error)[:200]) from None
                if len(column) != self._file.metadata.row_group(number).num_rows:
                    why = f"it holds {len(column):,} rows, not what its footer says"
                    raise DataError(f"{path} is damaged in row group {number}", why=why)
                self._groups[number] = column.field("bytes") if pa.types.is_struct(column.type) else column
                while len(self._groups) > 1 and sum(group.nbytes for group in self._groups.values()) > _HELD:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]


def _check_sizes(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuse a file whose footer announces over 100 times its size: encoded images do not compress."""
    total = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    total, held = max(total, metadata.num_rows * 8), path.stat().st_size
    if total > max(_BOMB_SIZE, _BOMB_RATIO * held):
        raise DataError(
            f"{path} claims to unfold {held:,} bytes into {total:,}",
            why=f"more than {_BOMB_RATIO} times: no real images compress like that, so it is refused as a bomb",
        )


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Class names by column, from Hugging Face's features; under ``""`` those of the entry ``classes``, if any."""
    text = metadata.get(b"classes", b"").decode("utf-8", "replace")
    found = {"": text.split(",")} if text else {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found |= {str(name): list(map(str, kind["names"])) for name, kind in features.items() if "names" in kind}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        pass
    return {name: tuple(text.strip() for text in texts) for name, texts in found.items()}


def _footer_hash(path: Path, size: int) -> str:
    """SHA-256 of the footer: sizes, places and statistics of every column chunk."""
    with path.open("rb") as raw:
        raw.seek(-8 - size, 2)
        return hashlib.sha256(raw.read()).hexdigest()
