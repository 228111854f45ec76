"""Files of generated images: the EDM ``.npz`` layout (`puma.data.edmfile`), or Parquet in the Hugging Face layout.

Both are written in constant memory and with the same bytes each time. Where the images come from travels inside: in
the archive's comment, or in the Parquet schema's metadata under ``puma``.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data import edmfile
from puma.io import atomic_path

FORMATS = (".npz", ".parquet")


def write_parquet(
    path: Path | str,
    chunks: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    *,
    class_names: Sequence[str],
    comment: dict[str, Any],
) -> None:
    """Write images as PNG bytes in the Hugging Face layout, atomically; one row group per chunk.

    Columns ``image`` (struct of ``bytes`` and ``path``) and ``label`` (int64), with the features declared, so that
    ``datasets.load_dataset("parquet", data_files=...)`` gives images and class names.

    Args:
        path: target.
        chunks: uint8 [n, H, W, C] each with C 1 or 3, ``len(labels)`` rows in all.
        labels: int64 [N].
        class_names: one name per label.
        comment: JSON-able provenance.

    Raises:
        ValueError: the chunks do not add up to ``len(labels)`` rows.
        StorageError: the disk is full or the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={
            "huggingface": json.dumps({"info": {"features": features}}),
            "puma": json.dumps(comment, sort_keys=True),
        },
    )
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="none", write_page_checksum=True) as writer,
    ):
        rows = 0
        for chunk in chunks:
            images = [{"bytes": _png(image), "path": None} for image in chunk]
            columns = {"image": images, "label": labels[rows : rows + len(chunk)]}
            writer.write_table(pa.table(columns, schema=schema))
            rows += len(chunk)
        if rows != len(labels):
            raise ValueError(f"{rows} images but {len(labels)} labels")


def read_comment(path: Path | str) -> dict[str, Any]:
    """The provenance inside a file written here; empty for any other or broken file."""
    if Path(path).suffix != ".parquet":
        return edmfile.read_comment(path)
    import pyarrow.parquet as pq

    try:
        told = json.loads((pq.read_schema(path).metadata or {}).get(b"puma", b"{}"))
    except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
        return {}
    return told if isinstance(told, dict) else {}


def read_part(path: Path, settings: str, rows: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """Images and labels of a part, checked against its checksums; None if missing, broken or of other settings."""
    if read_comment(path).get("settings") != settings:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["image"], arrays["label"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return (images, labels) if len(images) == len(labels) == rows else None


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "png")
    return buffer.getvalue()
