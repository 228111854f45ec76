"""Images read in place from ``.npy`` arrays, in a file of their own or inside an ``.npz``."""

from __future__ import annotations

import hashlib
import io
import math
import os
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from puma.data.checks import check_image_layout, check_labels
from puma.data.source import Images, Pixels, Rows, Shape, Source
from puma.data.spec import Options
from puma.errors import DataError
from puma.io import fingerprint, sha256_file

_LONGEST_HEADER = 16_384
_LABEL_ENDINGS = ("_labels", "_label", "-labels", "-label", ".labels")
_UNREADABLE = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError, tokenize.TokenError)


class Mapped(Images):
    """uint8 images ``[N, H, W, C]`` that begin at ``offset`` of a file and are read in place; any thread may read.

    Neighbouring rows are read in one piece, with the system's read-ahead, and scattered rows one by one without it. A
    map (used only where the system has no ``preadv``) would fault in every row anew, drag megabytes along with each row
    that is not cached, count as resident memory, and end the process where the file has been cut short. Survives
    pickling: a worker opens the file again.
    """

    def __init__(self, path: Path, offset: int, shape: Shape, size: int | None = None) -> None:
        super().__init__(shape)
        self._path, self._offset, self._row_size = path, offset, math.prod(shape[1:])
        self._pieces, self._rows = path.open("rb"), path.open("rb")
        status = os.fstat(self._rows.fileno())
        self._size, self._modified = size or status.st_size, status.st_mtime_ns
        self._check_unchanged()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._rows.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mapped, (self._path, self._offset, self.shape, self._size)

    def _check_unchanged(self) -> None:
        status = os.fstat(self._rows.fileno())
        if (status.st_size, status.st_mtime_ns) != (self._size, self._modified):
            raise DataError(
                f"{self._path} has been changed since it was opened",
                why=f"it had {self._size:,} bytes and now has {status.st_size:,}, or was written to",
                fix="leave data files alone while they are in use; run the same command again",
            )

    def read(self, rows: Rows) -> Pixels:
        """See `puma.data.source.Images.read`; `DataError` where the file has been changed since it was opened."""
        self._check_unchanged()
        if not hasattr(os, "preadv"):
            return np.memmap(self._path, np.uint8, "r", self._offset, self.shape).take(rows, axis=0)
        count, size = len(rows), self._row_size
        images = np.empty((count, *self.shape[1:]), np.uint8)
        target = images.reshape(-1).data
        if count > 1 and rows[-1] - rows[0] == count - 1 and bool((np.diff(rows) == 1).all()):
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
                self._check_unchanged()
                raise DataError(f"{self._path} ends too early", fix="copy it again")
            done += got


@dataclass(frozen=True)
class Header:
    """An ``.npy`` header; the values begin ``length`` bytes after its first byte and take ``data_size`` bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    length: int
    data_size: int


def read_header(file: IO[bytes], size: int, where: str) -> Header:
    """Read the header at the beginning of ``file``; ``size`` is how many bytes header and values have together.

    Raises:
        DataError: not an ``.npy`` array, Fortran order, object or structured dtype, or a header that claims more or
            fewer bytes than there are (so that nothing is ever allocated for a lie).
    """
    start = io.BytesIO(file.read(_LONGEST_HEADER))  # numpy would read a header of any announced length
    try:
        version = np.lib.format.read_magic(start)
        if version not in ((1, 0), (2, 0), (3, 0)):  # 3.0 is 2.0 in UTF-8: the same for arrays of numbers
            raise ValueError(f".npy version {version[0]}.{version[1]}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(start, max_header_size=_LONGEST_HEADER)
    except _UNREADABLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{where} has an .npy header that cannot be read", why=why) from None
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects (pickle)",
            why="reading them would run code from the file, so PUMA never does",
            fix="save plain arrays: uint8 images, int64 labels",
        )
    if dtype.kind not in "biufcUS" or dtype.subdtype is not None or not dtype.itemsize or any(n < 0 for n in shape):
        raise DataError(f"{where} is {dtype} of shape {shape}", why="a plain array of numbers is expected")
    header = Header(shape, dtype, start.tell(), math.prod(shape) * dtype.itemsize)
    if header.length + header.data_size != size:
        claim = f"{dtype}[{', '.join(map(str, shape))}], {header.data_size:,} bytes"
        why = "the header is wrong or the file is truncated"
        raise DataError(f"{where} claims {claim}, but holds {size - header.length:,}", why=why, fix="write it again")
    if fortran_order and len(shape) > 1:
        why = "its images are scattered over the whole file"
        raise DataError(f"{where} is in Fortran order", why=why, fix="save np.ascontiguousarray(images)")
    return header


def check_headers(file: IO[bytes], images: Header, labels: Header, where: str, where_labels: str) -> None:
    """Check arrays of images and labels before anything but their headers, and a sample of odd images, is read.

    Raises:
        DataError: as `puma.data.checks.check_image_layout` and `puma.data.checks.check_labels`.
    """
    sample = None
    if images.dtype != np.uint8:  # say in which range the values lie
        file.seek(images.length)
        count = min(1 << 16, images.data_size // images.dtype.itemsize)
        sample = np.frombuffer(file.read(count * images.dtype.itemsize), images.dtype)
    check_image_layout(images.shape, images.dtype, sample, where)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        check_labels(np.broadcast_to(np.zeros((), labels.dtype), labels.shape), images.shape[0], where_labels)


def load_npy(path: Path, options: Options) -> Source:
    """Open ``images.npy``, read in place; labels come from ``options.labels`` or ``images_labels.npy`` beside it.

    An ``.npy`` file carries no checksum: the fingerprint covers its header and 256 blocks spread over it, that of
    ``verify="full"`` every byte.

    Raises:
        DataError: missing or damaged file, wrong dtype, layout or labels.
    """
    options.only(path, "labels")
    label_path = _label_path(path) if options.labels is None else Path(options.labels)
    try:
        with path.open("rb") as file, label_path.open("rb") as label_file:
            header = read_header(file, path.stat().st_size, str(path))
            label_header = read_header(label_file, label_path.stat().st_size, str(label_path))
            check_headers(file, header, label_header, str(path), str(label_path))
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist") from None
    except OSError as error:
        raise DataError(f"cannot read {path}", why=str(error)) from None
    values = np.fromfile(label_path, label_header.dtype, offset=label_header.length)
    pixels = sha256_file(path) if options.verify == "full" else _sampled_hash(path)
    n, height, width, channels = header.shape
    return Source(
        Mapped(path, header.length, (n, height, width, channels)),
        check_labels(values, n, str(label_path)),
        name=path.stem,
        fingerprint=fingerprint({"format": "npy", "image": pixels, "label": sha256_file(label_path)}),
    )


def _label_path(path: Path) -> Path:
    for ending in _LABEL_ENDINGS:
        if (beside := path.with_name(f"{path.stem}{ending}.npy")).is_file():
            return beside
    why = f"there is no {path.stem}_labels.npy beside it"
    raise DataError(f"{path} has no labels", why=why, fix=f'name them: "{path}?labels=labels.npy"')


def _sampled_hash(path: Path, blocks: int = 256, block: int = 4096) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in np.unique(np.linspace(0, max(size - block, 0), blocks).astype(np.int64)):
            file.seek(int(start))
            digest.update(file.read(block))
    return digest.hexdigest()
