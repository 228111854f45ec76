"""Images in a compressed ``.npz`` member: readable in constant memory, but never at the speed of a mapped one."""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.archive import Member
from puma.data.images import ArrayImages, Images, Rows, Shape
from puma.data.inflate import MemberReader
from puma.data.npy import Header
from puma.errors import DataError

logger = logging.getLogger("puma")

IN_MEMORY = 256 << 20
_PROBE = 8 << 20
_SKIP = 1 << 20
_RESTARTS = 256


def compressed_images(member: Member, header: Header, shape: Shape) -> Images:
    """Open the images of a compressed member, with a warning that says what it costs.

    Up to 256 MiB are inflated into memory; larger ones are inflated again wherever they are read.

    Raises:
        DataError: damaged; or larger than that and in Fortran order, whose rows are scattered over the whole member.
    """
    if header.data_size <= IN_MEMORY:
        with MemberReader(member) as reader:
            reader.read(header.length)
            started = time.perf_counter()
            data = reader.read(header.data_size)
            _warn(member.path, header, len(data) / max(time.perf_counter() - started, 1e-9), in_memory=True)
        array = np.frombuffer(data, np.uint8)
        return ArrayImages(array.reshape(shape, order="F" if header.fortran_order else "C"))
    if header.fortran_order:
        raise DataError(
            f"{member.path}: member {member.name!r} is compressed and in Fortran order",
            why="its images can only be read by inflating all of it into memory",
            fix="save np.ascontiguousarray(images) with np.savez",
        )
    with MemberReader(member) as reader:
        started = time.perf_counter()
        reader.read(_PROBE)
        _warn(member.path, header, _PROBE / max(time.perf_counter() - started, 1e-9), in_memory=False)
    return CompressedImages(member, header, shape)


class CompressedImages:
    """Images of a deflated member, inflated from the nearest of at most 256 places where it was inflated before.

    Sequential reads cost one pass. A random row costs up to 1/256 of a pass, once a pass has been there. Memory:
    about 15 MiB of restart states, whatever the size. Thread-safe; survives pickling.
    """

    def __init__(self, member: Member, header: Header, shape: Shape) -> None:
        self.shape = shape
        self._member, self._header = member, header
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._spacing = max(_PROBE, self._member.size // _RESTARTS)
        self._reader = MemberReader(self._member)
        self._restarts = [self._reader.clone()]

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `puma.data.images.Images.read`."""
        wanted, places = np.unique(rows, return_inverse=True)
        out = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        row_size = math.prod(self.shape[1:])
        flat = out.reshape(len(wanted), row_size)
        with self._lock:
            for place, row in enumerate(wanted):
                self._seek(self._header.length + int(row) * row_size)
                flat[place] = np.frombuffer(self._reader.read(row_size), np.uint8)
                self._remember()
        return out if len(wanted) == len(rows) and (np.diff(places) > 0).all() else out[places]

    def _seek(self, position: int) -> None:
        """Bring the reader to ``position``: on from where it is, or from the last restart before it."""
        restart = self._restarts[min(position // self._spacing, len(self._restarts) - 1)]
        if self._reader.position > position or restart.position > self._reader.position:
            self._reader = restart.clone()
        while self._reader.position < position:
            self._reader.read(min(_SKIP, position - self._reader.position))
            self._remember()

    def _remember(self) -> None:
        """Keep a restart once for every ``spacing`` bytes, at the first position at or after its multiple."""
        if self._reader.position >= len(self._restarts) * self._spacing:
            self._restarts.append(self._reader.clone())

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "_member": self._member, "_header": self._header}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _warn(path: Path, header: Header, rate: float, *, in_memory: bool) -> None:
    seconds = header.data_size / rate
    cost = "held in memory" if in_memory else f"one pass costs {seconds:,.0f} s of inflating, random rows far more"
    logger.warning(
        "%s is compressed (%.0f MB/s here): %s. `puma data unpack %s` makes a file that is mapped and costs nothing",
        path,
        rate / 1e6,
        cost,
        path,
    )
