"""Images in a file, mapped into memory: nothing is read before it is asked for."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.images import Rows, Shape
from puma.errors import DataError

_RESIDENT = 256 << 20
_FAULT_AROUND = 1 << 16  # Linux maps up to 64 KiB around a page that is touched


class MappedImages:
    """uint8 images ``[N, H, W, C]`` that begin at ``offset`` of a file; any thread may read.

    Neighbouring rows are read in one piece from the file, with the system's read-ahead; scattered rows come through the
    map, which is told not to read ahead (else each row that is not cached drags megabytes with it). Pages of the map
    are given back to the system after every 256 MiB (they stay in its cache), so that the resident memory of this
    process does not grow with the file. Survives pickling: a worker maps the file again.
    """

    def __init__(self, path: Path, offset: int, shape: Shape, *, fortran_order: bool = False) -> None:
        self.shape = shape
        self._path, self._offset, self._order = path, offset, "F" if fortran_order else "C"
        self._open()

    def _open(self) -> None:
        self._file = self._path.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        order: Any = self._order
        self._array: NDArray[np.uint8] = np.ndarray(self.shape, np.uint8, self._map, self._offset, order=order)
        self._touched = 0

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `puma.data.images.Images.read`.

        Raises:
            DataError: the file has become shorter since it was opened.
        """
        count = len(rows)
        neighbours = count > 1 and rows[-1] - rows[0] == count - 1 and bool((np.diff(rows) == 1).all())
        if neighbours and self._order == "C" and hasattr(os, "preadv"):
            return self._piece(int(rows[0]), count)
        # np.take is the faster of the two, but would first copy all of a Fortran-ordered array
        images = np.take(self._array, rows, axis=0) if self._order == "C" else np.ascontiguousarray(self._array[rows])
        self._touched += count * _FAULT_AROUND
        if self._touched > _RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return images

    def _piece(self, first: int, count: int) -> NDArray[np.uint8]:
        """Rows ``first`` to ``first + count``, without the map."""
        images = np.empty((count, *self.shape[1:]), np.uint8)
        target = images.reshape(-1).data
        done, start = 0, self._offset + first * math.prod(self.shape[1:])
        while done < len(target):
            got = os.preadv(self._file.fileno(), [target[done:]], start + done)
            if not got:
                raise DataError(
                    f"{self._path} has become shorter since it was opened", fix="copy it again, start again"
                )
            done += got
        return images

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "_path": self._path, "_offset": self._offset, "_order": self._order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
