"""Images in a file, mapped into memory: nothing is read before it is asked for."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.images import Rows, Shape

_RESIDENT = 256 << 20
_FAULT_AROUND = 1 << 16  # Linux maps up to 64 KiB around a page that is touched


class MappedImages:
    """uint8 images ``[N, H, W, C]`` that begin at ``offset`` of a file; any thread may read.

    Pages that have been read are given back to the system after every 256 MiB (they stay in its cache), so that the
    resident memory of this process does not grow with the file. Survives pickling: a worker maps the file again.
    """

    def __init__(self, path: Path, offset: int, shape: Shape, *, fortran_order: bool = False) -> None:
        self.shape = shape
        self._path, self._offset, self._order = path, offset, "F" if fortran_order else "C"
        self._open()

    def _open(self) -> None:
        with self._path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        order: Any = self._order
        self._array: NDArray[np.uint8] = np.ndarray(self.shape, np.uint8, self._map, self._offset, order=order)
        self._touched = 0

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `puma.data.images.Images.read`."""
        count = len(rows)
        if count and rows[-1] - rows[0] == count - 1 and (np.diff(rows) == 1).all():
            images = self._array[rows[0] : rows[-1] + 1].copy(order="C")
            self._touched += images.nbytes
        else:
            images = self._picked(rows)
            self._touched += count * _FAULT_AROUND
        if self._touched > _RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return images

    def _picked(self, rows: Rows) -> NDArray[np.uint8]:
        if self._order == "F":  # np.take would first copy all of it into C order
            return np.ascontiguousarray(self._array[rows])
        return np.take(self._array, rows, axis=0)

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "_path": self._path, "_offset": self._offset, "_order": self._order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
