"""Images read in place from a file: nothing is read before it is asked for."""

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

_RESIDENT = 64 << 20


class MappedImages:
    """uint8 images ``[N, H, W, C]`` that begin at ``offset`` of a file; any thread may read.

    Up to 64 MiB are mapped into memory. Of a larger file neighbouring rows are read in one piece, with the system's
    read-ahead, and scattered rows one by one without it: a map would fault in every row anew, drag megabytes along with
    each row that is not cached, and count as resident memory of this process. Survives pickling: a worker opens the
    file again.
    """

    def __init__(self, path: Path, offset: int, shape: Shape, *, fortran_order: bool = False) -> None:
        self.shape = shape
        self._path, self._offset, self._order = path, offset, "F" if fortran_order else "C"
        self._open()

    def _open(self) -> None:
        self._row_size = math.prod(self.shape[1:])
        self._pieces, self._rows = self._path.open("rb"), self._path.open("rb")
        self._map = mmap.mmap(self._pieces.fileno(), 0, access=mmap.ACCESS_READ)
        order: Any = self._order
        self._array: NDArray[np.uint8] = np.ndarray(self.shape, np.uint8, self._map, self._offset, order=order)
        self._in_place = self._order == "C" and self._array.nbytes > _RESIDENT and hasattr(os, "preadv")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._rows.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `puma.data.images.Images.read`.

        Raises:
            DataError: the file has become shorter since it was opened.
        """
        count = len(rows)
        neighbours = count > 0 and rows[-1] - rows[0] == count - 1 and bool((np.diff(rows) == 1).all())
        if neighbours and not self._in_place:
            return self._array[rows[0] : rows[-1] + 1].copy(order="C")
        if not self._in_place:
            # np.take is the faster of the two, but would first copy all of a Fortran-ordered array
            return np.take(self._array, rows, axis=0) if self._order == "C" else np.ascontiguousarray(self._array[rows])
        images = np.empty((count, *self.shape[1:]), np.uint8)
        target, size = images.reshape(-1).data, self._row_size
        if neighbours and count > 1:
            self._fill(self._pieces.fileno(), target, int(rows[0]))
        else:
            descriptor = self._rows.fileno()
            for place, row in enumerate(rows.tolist()):
                self._fill(descriptor, target[place * size : (place + 1) * size], row)
        return images

    def _fill(self, descriptor: int, target: memoryview, row: int) -> None:
        """Fill ``target`` with the bytes from ``row`` on."""
        start = self._offset + row * self._row_size
        done = os.preadv(descriptor, [target], start)
        while done < len(target):
            got = os.preadv(descriptor, [target[done:]], start + done)
            if not got:
                raise DataError(
                    f"{self._path} has become shorter since it was opened", fix="copy it again, start again"
                )
            done += got

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "_path": self._path, "_offset": self._offset, "_order": self._order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
