"""The header of an ``.npy`` array: shape, dtype and order, checked against the bytes that are really there."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from puma.errors import DataError

_LONGEST_HEADER = 16_384
_MAGIC = b"\x93NUMPY"


class Readable(Protocol):
    """A file, or a member of an archive."""

    def read(self, count: int, /) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        ...


@dataclass(frozen=True)
class Header:
    """What an ``.npy`` header says; the values begin ``length`` bytes after its first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran_order: bool
    length: int

    @property
    def data_size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Readable, size: int, where: str) -> Header:
    """Read the header at the file's position; ``size`` is how many bytes header and values have together.

    Raises:
        DataError: not an ``.npy`` array, object or structured dtype, or a header that claims more or fewer bytes than
            there are (so that nothing is ever allocated for a lie).
    """
    start = file.read(10)
    if start[:6] != _MAGIC or len(start) < 10:
        raise DataError(f"{where} is not an .npy array", why="its first bytes are not those of one")
    version = (start[6], start[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise DataError(f"{where} has .npy version {version[0]}.{version[1]}", why="versions 1.0, 2.0 and 3.0 exist")
    if version != (1, 0):
        start += file.read(2)
    announced = int.from_bytes(start[8:], "little")
    if announced > _LONGEST_HEADER:
        raise DataError(f"{where} announces a header of {announced:,} bytes", why="the file is damaged or hostile")
    text = file.read(announced)
    if len(text) != announced:
        raise DataError(f"{where} ends inside its header", why="the file is truncated")
    header = _parsed(text, version, where, len(start) + announced)
    if header.length + header.data_size != size:
        raise DataError(
            f"{where} claims {_text(header)}, {header.data_size:,} bytes, but holds {size - header.length:,}",
            why="the header lies or the file is truncated",
            fix="write the file again",
        )
    return header


def _parsed(block: bytes, version: tuple[int, int], where: str, length: int) -> Header:
    try:
        text = block.decode("utf-8" if version == (3, 0) else "latin1")
        fields = ast.literal_eval(text.strip())  # literals only: nothing in the file is ever run
        shape, fortran_order = fields["shape"], fields["fortran_order"]
        plain = isinstance(fields["descr"], str) and "," not in fields["descr"]
        dtype = np.dtype(fields["descr"] if plain else "V1")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError, OverflowError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200].partition(": <ast.")[0]
        raise DataError(f"{where} has a header that cannot be read", why=why) from None
    if not plain:
        raise DataError(f"{where} is a structured array", why="a plain array of numbers is expected")
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects (pickle)",
            why="reading them would run code from the file, so PUMA never does",
            fix="save plain arrays: uint8 images, int64 labels",
        )
    if dtype.kind not in "biufcUS" or dtype.subdtype is not None or not dtype.itemsize:
        raise DataError(f"{where} has dtype {dtype}", why="a plain array of numbers is expected")
    if not isinstance(shape, tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise DataError(f"{where} claims shape {shape}", why="the header lies")
    if not isinstance(fortran_order, bool):
        raise DataError(f"{where} claims order {fortran_order!r}", why="the header lies")
    return Header(shape, dtype, fortran_order, length)


def _text(header: Header) -> str:
    return f"{header.dtype}[{', '.join(map(str, header.shape))}]"
