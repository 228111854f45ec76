"""Parquet in the Hugging Face layout: an ``img`` or ``image`` column, and ``label``.

The image column holds encoded files (binary, or a struct with ``bytes``), or raw pixels: a fixed-size binary of
``H * W * C`` bytes in HWC order, its shape taken from the ``shape`` entry of the schema's metadata ("32,32,3") or, for
square images, from the number of bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puma.data.checks import check_image_layout, check_labels, chosen_label
from puma.data.images import EncodedImages
from puma.data.source import Images, Pixels, Rows, Source
from puma.data.spec import Options
from puma.errors import DataError, PumaError
from puma.io import sha256_file

_IMAGE_COLUMNS = ("img", "image", "images")
_BOMB_RATIO, _BOMB_SIZE = 100, 64 << 20
_HELD = 512 << 20


def load_parquet(path: Path, options: Options) -> Source:
    """Open one Parquet file of images and labels; images are decoded when they are read.

    The fingerprint is of the footer; ``verify="full"`` compares page checksums and fingerprints every byte.

    Raises:
        UsageError: several columns of labels, and none chosen.
        DataError: damaged file, missing column, wrong types or labels, an image that cannot be decoded.
    """
    options.only(path, "label")
    full = options.verify == "full"
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
            if image is None:
                raise DataError(f"{path} has no column 'img'", why=f"it has: {', '.join(schema.names)}")
            whole = (field.name for field in schema if pa.types.is_integer(field.type) and "label" in field.name)
            label = chosen_label(schema.names, {*whole, *_features(schema.metadata)}, options.label, str(path))
            _check_sizes(path, metadata)
            labels = file.read(columns=[label]).column(0).combine_chunks()
        files = ColumnBytes(path, image, checksums=full)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except PumaError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # damaged text in the footer is a UnicodeDecodeError
        raise DataError(f"{path} is not a readable Parquet file", why=str(error)[:200]) from None
    if not len(labels):
        raise DataError(f"{path} holds no rows")
    if labels.null_count or not pa.types.is_integer(labels.type):
        raise DataError(
            f"{path}: {label} is {labels.type}, {labels.null_count} missing", why="labels are class numbers"
        )
    names = _class_names(schema.metadata or {}, label)
    values = check_labels(labels.to_numpy(zero_copy_only=False), metadata.num_rows, f"{path}: {label}", names)
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        images: Images = EncodedImages(files, len(values), options)
    elif pa.types.is_fixed_size_binary(kind):
        shape = _raw_shape(kind.byte_width, schema.metadata or {}, f"{path}: {image}")
        images = Images((len(values), *shape), partial(_read_raw, files, shape), slow=True)
        check_image_layout(images.shape, np.dtype(np.uint8), None, f"{path}: {image}")
    else:
        why = "images are encoded files (binary, or a struct with bytes) or raw pixels"
        raise DataError(f"{path}: {image} is {kind}", why=why)
    fingerprint = sha256_file(path) if full else _footer_hash(path, metadata.serialized_size)
    return Source(images, values, name=path.stem, fingerprint=fingerprint, class_names=names)


def _read_raw(files: ColumnBytes, image_shape: tuple[int, int, int], rows: Rows) -> Pixels:
    pixels = np.frombuffer(b"".join(files(row)[0] for row in rows.tolist()), np.uint8)
    return pixels.reshape(len(rows), *image_shape).copy()


class ColumnBytes:
    """The values of a binary column (or of the ``bytes`` of a struct column), read by row group as they are asked for.

    The row groups read last stay in memory, up to 512 MiB.
    """

    def __init__(self, path: Path, column: str, checksums: bool) -> None:
        self._settings = (path, column, checksums)
        self._file = pq.ParquetFile(path, page_checksum_verification=checksums)
        groups = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._groups: OrderedDict[int, pa.Array] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return ColumnBytes, self._settings

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


def _raw_shape(width: int, metadata: dict[bytes, bytes], where: str) -> tuple[int, int, int]:
    """Height, width and channels of raw pixels. The number of bytes decides: no ``s * s`` is a ``3 * t * t``."""
    text = metadata.get(b"shape", b"").decode("utf-8", "replace")
    if text:
        sizes = [int(part) for part in text.split(",") if part.strip().isdigit()]
        if len(sizes) != 3 or math.prod(sizes) != width:
            raise DataError(f"{where} has {width} bytes a row, its metadata says shape {text!r}")
        return sizes[0], sizes[1], sizes[2]
    for channels in (1, 3):
        side = math.isqrt(width // channels)
        if side * side * channels == width:
            return side, side, channels
    fix = 'add "shape": "H,W,C" to the schema metadata'
    raise DataError(f"{where} has {width} bytes a row, no square image", fix=fix)


def _check_sizes(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuse a file whose footer announces over 100 times its size: encoded images do not compress."""
    total = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    total = max(total, metadata.num_rows * 8)
    held = path.stat().st_size
    if total > max(_BOMB_SIZE, _BOMB_RATIO * held):
        raise DataError(
            f"{path} claims to unfold {held:,} bytes into {total:,}",
            why=f"more than {_BOMB_RATIO} times: no real images compress like that, so it is refused as a bomb",
        )


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """The columns with class names in Hugging Face's features, and the names."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {str(name): list(map(str, kind["names"])) for name, kind in features.items() if "names" in kind}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """Class names from Hugging Face's features, or from a comma-separated ``classes`` entry."""
    text = metadata.get(b"classes", b"").decode("utf-8", "replace")
    names = _features(metadata).get(label) or (text.split(",") if text else [])
    return tuple(name.strip() for name in names) or None


def _footer_hash(path: Path, size: int) -> str:
    """SHA-256 of the footer: sizes, places and statistics of every column chunk."""
    with path.open("rb") as raw:
        raw.seek(-8 - size, 2)
        return hashlib.sha256(raw.read()).hexdigest()
