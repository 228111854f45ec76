"""Parquet in the Hugging Face layout: an ``img`` or ``image`` column of encoded bytes, and ``label``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puma.data.encoded import EncodedImages, decoded, resized
from puma.data.images import Images, RememberedImages, Rows
from puma.data.layout import check_labels
from puma.data.npz import LABEL_NAMES
from puma.data.source import ImageSource
from puma.errors import DataError
from puma.files import sha256_file

_IMAGE_COLUMNS = ("img", "image")
REMEMBER = 1 << 30


def load_parquet(path: Path | str, *, verify: str = "free", resize: int | None = None) -> ImageSource:
    """Open one Parquet file of encoded images and labels.

    Args:
        path: the file.
        verify: ``"full"`` compares page checksums, decodes every image and fingerprints every byte.
        resize: scale each image to this side.

    Raises:
        DataError: damaged file, missing column, wrong labels, an image that cannot be decoded.
    """
    path = Path(path)
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        image = _column(path, schema.names, _IMAGE_COLUMNS)
        label = _column(path, schema.names, LABEL_NAMES)
        table = pq.read_table(path, columns=[image, label], page_checksum_verification=verify == "full")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file", why=str(error)[:200]) from None
    column = table.column(image).combine_chunks()
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    labels = table.column(label).combine_chunks()
    if column.null_count or labels.null_count:
        raise DataError(f"{path} has rows without an image or a label")
    names = _class_names(schema.metadata or {}, label)
    values = check_labels(labels.to_numpy(zero_copy_only=False), len(column), f"{path}: {label}", names)
    where = f"{path}: {image}"
    first = decoded(column[0].as_buffer(), f"{where}, row 0")
    first = first if resize is None else resized(first, resize)

    def fetch(rows: Rows) -> list[Any]:
        return [column[int(row)].as_buffer() for row in rows]

    images: Images = EncodedImages(fetch, (len(column), *first.shape), where, resize)
    if len(column) * first.size <= REMEMBER:
        images = RememberedImages(images)
    if verify == "full":
        for start in range(0, len(column), 1024):
            images.read(np.arange(start, min(start + 1024, len(column))))
    return ImageSource(images, values, name=path.stem, fingerprint=_fingerprint(path, file, verify), class_names=names)


def _column(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(f"{path} has no column {wanted[0]!r}", why=f"it has: {', '.join(names)}")


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """Class names from Hugging Face's features, or from a comma-separated ``classes`` entry."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        text = metadata.get(b"classes", b"").decode("utf-8", "replace")
        return tuple(name.strip() for name in text.split(",")) if text else None


def _fingerprint(path: Path, file: pq.ParquetFile, verify: str) -> str:
    """SHA-256 of the footer (sizes, places and statistics of every column chunk); of every byte where asked for."""
    if verify == "full":
        return sha256_file(path)
    with path.open("rb") as raw:
        raw.seek(-8 - file.metadata.serialized_size, 2)
        return hashlib.sha256(raw.read()).hexdigest()
