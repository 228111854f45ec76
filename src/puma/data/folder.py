"""Folders of image files, one folder for each class: ``root/cat/1.png``.

Read by our own code rather than ``datasets``: for 10,000 PNG files of 32x32 its ``imagefolder`` took 4.9 s on every
opening (6.8 s the first time, ours 0.14 s), 0.79 s to decode (0.57 s), 0.5 s to import and 130 MB more memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from puma.data.checks import check_labels
from puma.data.images import EncodedImages
from puma.data.source import Rows, Source
from puma.errors import DataError
from puma.io import fingerprint, sha256_file

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
_ONE_EACH = "one folder for each class: root/cat/1.png"


class FileBytes:
    """The bytes of files by row."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def where(self, row: int) -> str:
        """The path."""
        return str(self._paths[row])

    def __call__(self, rows: Rows) -> list[Any]:
        """The contents of the files at ``rows``.

        Raises:
            DataError: a file that has vanished or cannot be read.
        """
        try:
            return [self._paths[int(row)].read_bytes() for row in rows]
        except OSError as error:
            raise DataError(f"cannot read {error.filename}", why=str(error.strerror)) from None


def load_folder(
    root: Path | str, *, verify: str = "headers", resize: int | None = None, channels: int | None = None
) -> Source:
    """Open a folder of class folders; classes and files in the order of their names (hidden ones are left out).

    The fingerprint covers the names and sizes of all files, that of ``verify="full"`` their bytes too.

    Raises:
        DataError: no image, an image beside the class folders, images of several shapes without ``resize``, grey and
            RGB ones without ``channels=3``.
    """
    root = Path(root)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if loose := [entry.name for entry in os.scandir(root) if Path(entry.name).suffix.lower() in ENDINGS]:
        raise DataError(f"{root} holds {loose[0]} outside any class folder", fix=_ONE_EACH)
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        files = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        paths += files
        labels += [number] * len(files)
    if not paths:
        raise DataError(f"{root} holds no images", fix=_ONE_EACH)
    images = EncodedImages(FileBytes(paths), len(paths), resize, channels)
    listing = [
        [str(path.relative_to(root)), path.stat().st_size, sha256_file(path) if verify == "full" else ""]
        for path in paths
    ]
    return Source(
        images,
        check_labels(np.array(labels, np.int64), len(paths), str(root), classes),
        name=root.resolve().name,
        fingerprint=fingerprint({"format": "folder", "files": listing}),
        class_names=classes,
    )
