"""Folders of image files, one folder for each class: ``root/cat/1.png``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from puma.data.encoded import EncodedImages, fitted
from puma.data.images import Rows, remembered
from puma.data.layout import check_labels
from puma.data.source import ImageSource
from puma.errors import DataError
from puma.io import fingerprint, sha256_file

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}


class FileBytes:
    """The bytes of files by row."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __call__(self, rows: Rows) -> list[Any]:
        """The contents of the files at ``rows``.

        Raises:
            DataError: a file that has vanished or cannot be read.
        """
        try:
            return [self.paths[int(row)].read_bytes() for row in rows]
        except OSError as error:
            raise DataError(f"cannot read {error.filename}", why=str(error.strerror)) from None


def load_folder(
    root: Path | str, *, verify: str = "free", resize: int | None = None, channels: int | None = None
) -> ImageSource:
    """Open a folder of class folders; classes and files in the order of their names (hidden ones are left out).

    The free fingerprint covers the names and sizes of all files, that of ``verify="full"`` their bytes too.

    Raises:
        DataError: no image, an image beside the class folders, images of several shapes without ``resize``, grey and
            RGB ones without ``channels=3``.
    """
    root = Path(root)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    loose = [entry.name for entry in os.scandir(root) if Path(entry.name).suffix.lower() in ENDINGS]
    if loose:
        raise DataError(
            f"{root} holds {loose[0]} outside any class folder", fix="one folder for each class: root/cat/1.png"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        paths += found
        labels += [number] * len(found)
    if not paths:
        raise DataError(f"{root} holds no images", fix="one folder for each class: root/cat/1.png")
    fetch = FileBytes(paths)
    first = fitted(fetch(np.array([0]))[0], str(paths[0]), resize, channels)
    images = EncodedImages(fetch, (len(paths), *first.shape), str(root), resize, channels)
    if verify == "full":
        for row in range(len(paths)):
            images.read(np.array([row]))
    listing = [
        [str(path.relative_to(root)), path.stat().st_size, sha256_file(path) if verify == "full" else ""]
        for path in paths
    ]
    return ImageSource(
        remembered(images),
        check_labels(np.array(labels, np.int64), len(paths), str(root), classes),
        name=root.resolve().name,
        fingerprint=fingerprint({"format": "folder", "files": listing}),
        class_names=classes,
    )
