"""Parquet in the Hugging Face layout: an ``img`` or ``image`` column, and ``label``.

The image column holds encoded files (binary, or a struct with ``bytes``), or raw pixels: a fixed-size binary of
``H * W * C`` bytes in HWC order, its shape taken from the ``shape`` entry of the schema's metadata ("32,32,3") or, for
square images, from the number of bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.data.encoded import EncodedImages, fitted
from puma.data.images import ArrayImages, Images, Rows, Shape, blocks, remembered
from puma.data.layout import LABEL_NAMES, check_image_layout, check_labels
from puma.data.rowgroups import ColumnBytes
from puma.data.source import ImageSource
from puma.errors import DataError
from puma.io import sha256_file

_IMAGE_COLUMNS = ("img", "image", "images")
_BOMB_RATIO, _BOMB_SIZE = 100, 64 << 20
_LABELS_SIZE = 8


def load_parquet(
    path: Path | str, *, verify: str = "free", resize: int | None = None, channels: int | None = None
) -> ImageSource:
    """Open one Parquet file of images and labels. Images are decoded when they are read, up to 1 GiB of them only once.

    Args:
        path: the file.
        verify: ``"full"`` compares page checksums, decodes every image and fingerprints every byte.
        resize: scale each encoded image to this side.
        channels: 3 makes RGB of encoded grey images.

    Raises:
        DataError: damaged file, missing column, wrong types or labels, an image that cannot be decoded.
    """
    path = Path(path)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image = _column(path, schema.names, _IMAGE_COLUMNS)
            label = _column(path, schema.names, LABEL_NAMES)
            _check_sizes(path, metadata)
            labels = file.read(columns=[label]).column(0).combine_chunks()
        fetch = ColumnBytes(path, image, checksums=verify == "full")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except DataError:
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
    where = f"{path}: {image}"
    images = (
        _raw_images(fetch, len(values), kind.byte_width, schema.metadata or {}, where)
        if pa.types.is_fixed_size_binary(kind)
        else _encoded_images(fetch, kind, len(values), where, resize, channels)
    )
    if verify == "full":
        for block in blocks(len(values), images.shape[1:]):
            images.read(np.arange(block.start, block.stop))
    fingerprint = sha256_file(path) if verify == "full" else _footer_hash(path, metadata.serialized_size)
    return ImageSource(images, values, name=path.stem, fingerprint=fingerprint, class_names=names)


class RawImages:
    """Images whose bytes are the pixels, HWC."""

    def __init__(self, fetch: ColumnBytes, shape: Shape) -> None:
        self.shape = shape
        self._fetch = fetch

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `puma.data.images.Images.read`."""
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        flat = out.reshape(len(rows), math.prod(self.shape[1:]))
        for place, data in enumerate(self._fetch(rows)):
            flat[place] = np.frombuffer(data, np.uint8)
        return out


def _encoded_images(
    fetch: ColumnBytes, kind: pa.DataType, rows: int, where: str, resize: int | None, channels: int | None
) -> Images:
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"{where} is {kind}", why="images are encoded files (binary, or a struct with bytes) or raw pixels"
        )
    first = fitted(fetch(np.array([0]))[0], f"{where}, row 0", resize, channels)
    return remembered(EncodedImages(fetch, (rows, *first.shape), where, resize, channels))


def _raw_images(fetch: ColumnBytes, rows: int, width: int, metadata: dict[bytes, bytes], where: str) -> Images:
    shape = _raw_shape(width, metadata, where)
    images = RawImages(fetch, (rows, *shape))
    check_image_layout(images.shape, np.dtype(np.uint8), None, where)
    if rows * width <= 1 << 30:
        return ArrayImages(images.read(np.arange(rows)))
    return images


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
    raise DataError(
        f"{where} has {width} bytes a row, no square image", fix='add "shape": "H,W,C" to the schema metadata'
    )


def _column(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(f"{path} has no column {wanted[0]!r}", why=f"it has: {', '.join(names)}")


def _check_sizes(path: Path, metadata: pq.FileMetaData) -> None:
    """Refuse a file whose footer announces over 100 times its size: encoded images do not compress."""
    total = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    held = path.stat().st_size
    if metadata.num_rows * _LABELS_SIZE > max(_BOMB_SIZE, _BOMB_RATIO * held) or (
        total > _BOMB_SIZE and total > _BOMB_RATIO * held
    ):
        raise DataError(
            f"{path} claims to unfold {held:,} bytes into {max(total, metadata.num_rows):,}",
            why=f"more than {_BOMB_RATIO} times: no real images compress like that, so it is refused as a bomb",
        )


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """Class names from Hugging Face's features, or from a comma-separated ``classes`` entry."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        text = metadata.get(b"classes", b"").decode("utf-8", "replace")
        return tuple(name.strip() for name in text.split(",")) if text else None


def _footer_hash(path: Path, size: int) -> str:
    """SHA-256 of the footer: sizes, places and statistics of every column chunk."""
    with path.open("rb") as raw:
        raw.seek(-8 - size, 2)
        return hashlib.sha256(raw.read()).hexdigest()
