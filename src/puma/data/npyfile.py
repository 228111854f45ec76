"""Images in a bare ``.npy`` file, with their labels in a second one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.layout import check_image_layout, check_labels
from puma.data.mapped import MappedImages
from puma.data.npy import Header, read_header
from puma.data.source import ImageSource
from puma.errors import DataError
from puma.io import fingerprint, sha256_file

_BLOCKS, _BLOCK = 256, 4096
_LABEL_ENDINGS = ("_labels", "_label", "-labels", "-label", ".labels")


def load_npy(path: Path | str, *, labels: Path | str | None = None, verify: str = "free") -> ImageSource:
    """Open ``images.npy``, mapped; labels come from ``labels``, by default ``images_labels.npy`` beside it.

    An ``.npy`` file carries no checksum: the free fingerprint covers its header and 256 blocks spread over it, that of
    ``verify="full"`` every byte.

    Raises:
        DataError: missing or damaged file, wrong dtype, layout or labels.
    """
    path = Path(path)
    label_path = _label_path(path) if labels is None else Path(labels)
    header, sample = _opened(path)
    check_image_layout(header.shape, header.dtype, None if header.dtype == np.uint8 else sample, str(path))
    label_header, _ = _opened(label_path)
    if len(label_header.shape) != 1 or label_header.shape[0] != header.shape[0] or label_header.dtype.kind not in "iu":
        check_labels(
            np.broadcast_to(np.zeros((), label_header.dtype), label_header.shape), header.shape[0], str(label_path)
        )
    values = np.fromfile(label_path, label_header.dtype, offset=label_header.length)
    checked = check_labels(values, header.shape[0], str(label_path))
    n, height, width, channels = header.shape
    pixels = sha256_file(path) if verify == "full" else _sampled_hash(path)
    return ImageSource(
        MappedImages(path, header.length, (n, height, width, channels), fortran_order=header.fortran_order),
        checked,
        name=path.stem,
        fingerprint=fingerprint({"format": "npy", "image": pixels, "label": sha256_file(label_path)}),
    )


def _opened(path: Path) -> tuple[Header, NDArray[Any]]:
    """The header and the first values."""
    try:
        with path.open("rb") as file:
            header = read_header(file, path.stat().st_size, str(path))
            data = file.read(min(header.data_size, (1 << 16) * header.dtype.itemsize))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"cannot read {path}", why=str(error)) from None
    return header, np.frombuffer(data, header.dtype)


def _label_path(path: Path) -> Path:
    for ending in _LABEL_ENDINGS:
        if (beside := path.with_name(f"{path.stem}{ending}.npy")).is_file():
            return beside
    raise DataError(
        f"{path} has no labels",
        why=f"there is no {path.stem}_labels.npy beside it",
        fix=f'name them: "{path}?labels=labels.npy"',
    )


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in np.unique(np.linspace(0, max(size - _BLOCK, 0), _BLOCKS).astype(np.int64)):
            file.seek(int(start))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
