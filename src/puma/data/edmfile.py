"""Writing the EDM layout: an uncompressed ``.npz`` with ``image`` and ``label``, and perhaps ``classes``.

It is the layout of the 1M-50M sets of Wang et al. 2023 (arXiv 2302.04638), which readers map instead of decoding.
Equal contents give equal bytes: no time of day is written.
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

from puma.io import atomic_path


def write_edm(
    path: Path | str,
    chunks: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    *,
    class_names: Sequence[str] = (),
    comment: dict[str, Any] | None = None,
) -> None:
    """Write image chunks and all labels, atomically and in constant memory.

    Args:
        path: target.
        chunks: uint8 ``[n, H, W, C]`` each, ``len(labels)`` rows in all; one is held at a time.
        labels: int64 ``[N]``.
        class_names: one for each class; none are written where there are none.
        comment: where the images come from; JSON that the archive carries as its comment (at most 65,535 bytes).

    Raises:
        ValueError: the chunks do not add up to ``len(labels)`` rows.
        StorageError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = b"" if comment is None else json.dumps(comment, sort_keys=True).encode()
        rows = 0
        with archive.open(entry("image.npy"), "w", force_zip64=True) as member:
            for chunk in chunks:
                if rows == 0:
                    member.write(_header((len(labels), *chunk.shape[1:]), chunk.dtype))
                member.write(np.ascontiguousarray(chunk).data)
                rows += len(chunk)
        if rows != len(labels):
            raise ValueError(f"{rows} images but {len(labels)} labels")
        arrays: dict[str, NDArray[Any]] = {"label.npy": labels.astype("<i8")}
        if class_names:
            arrays["classes.npy"] = np.array(class_names)
        for name, array in arrays.items():
            with archive.open(entry(name), "w", force_zip64=True) as member:
                member.write(_header(array.shape, array.dtype))
                member.write(array.tobytes())


def read_comment(path: Path | str) -> dict[str, Any]:
    """The JSON object in an archive's comment; empty for any other or broken file."""
    try:
        with zipfile.ZipFile(path) as archive:
            told = json.loads(archive.comment or b"{}")
    except (OSError, zipfile.BadZipFile, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def entry(name: str) -> zipfile.ZipInfo:
    """A directory entry with the earliest date that a zip can hold."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()
