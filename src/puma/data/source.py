"""Sources: labelled uint8 images with a name, class names and a fingerprint; their options, and readers of images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError, UsageError, unknown
from puma.rng import mixed_key, permuted

Rows = NDArray[np.int64]
Pixels = NDArray[np.uint8]
ImageShape = tuple[int, int, int]
_BLOCK = 16 << 20


class MapStyle(Protocol):
    """A map-style dataset: its items are ``(image, label)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Images:
    """A reader of N images of ``shape`` ``(N, H, W, C)`` by a picklable function; ``slow``: worth keeping once made."""

    def __init__(
        self, shape: tuple[int, ...], read: Callable[[Rows], Pixels] | None = None, *, slow: bool = False
    ) -> None:
        n, height, width, channels = shape
        self.shape = (n, height, width, channels)
        self._reader, self.slow = read, slow

    def read(self, rows: Rows) -> Pixels:
        """The images at ``rows`` (int64 in ``[0, N)``, any order, repeats allowed): a fresh uint8 ``[B, H, W, C]``."""
        assert self._reader is not None
        return self._reader(rows)


class Source:
    """Labelled images; a `Pool` is one too. ``source[i]`` is ``(uint8 [H, W, C], int)``.

    Args:
        images: the reader.
        labels: int64 ``[N]``, each in ``[0, num_classes)``, checked by `puma.data.checks`.
        name: a short name for tables and pictures.
        fingerprint: hex SHA-256 that tells this data from other data, independent of where the file lies.
        class_names: one for each class; default ``"0", "1", ...``.
        spec: the text from which another process can open the same source; None where there is none.
    """

    def __init__(
        self,
        images: Images,
        labels: NDArray[np.int64],
        *,
        name: str,
        fingerprint: str,
        class_names: Sequence[str] | None = None,
        spec: str | None = None,
    ) -> None:
        self.images, self.labels = images, labels
        self.name, self.fingerprint, self.spec = name, fingerprint, spec
        self.class_names = tuple(class_names or map(str, range(int(labels.max()) + 1)))
        self.num_classes = len(self.class_names)
        self.image_shape: ImageShape = images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        row = range(len(self))[index]
        return self.images.read(np.array([row]))[0], int(self.labels[row])

    def read(self, rows: Rows | slice) -> Pixels:
        """Images at ``rows`` (whole numbers, a mask or a slice): uint8 ``[B, H, W, C]``."""
        return self.images.read(checked_rows(rows, len(self)))

    def _repr_html_(self) -> str:
        from puma.margins import notebook_html

        counts = np.bincount(self.labels, minlength=self.num_classes)
        rows = [(name[:40], f"{count:,}") for name, count in zip(self.class_names[:20], counts, strict=False)]
        rows += [(f"and {self.num_classes - 20} more classes", "")] * (self.num_classes > 20)
        return notebook_html(repr(self)[1:-1], self.labels, rows)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return f"<{self.name}: {len(self):,} images {shape}, {self.num_classes} classes, {self.fingerprint[:12]}>"


# --- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What may be asked of any source, by keyword or after the ``?`` of a spec.

    Args:
        resize, channels: scale every image to this side, 1..4096 pixels; 3 turns greyscale into RGB.
        classes: keep only these classes, by name or number; they are renumbered in this order.
        subset, seed: keep this many images: stratified and seeded, never a prefix.
        split, label: which of several splits, and of several label columns.
        verify: ``"headers"``, or ``"full"``, which reads every byte once and compares checksums.
    """

    resize: int | None = None
    channels: int | None = None
    classes: tuple[str, ...] | None = None
    subset: int | None = None
    seed: int = 0
    split: str | None = None
    label: str | None = None
    verify: Literal["headers", "full"] = "headers"

    def __post_init__(self) -> None:
        if self.resize is not None and not 1 <= self.resize <= 4096:
            raise UsageError(f"resize={self.resize} is not a side in 1..4096")
        if self.channels not in (None, 1, 3):
            raise UsageError(f"channels={self.channels}", why="1 (grey) or 3 (RGB) are understood")
        if self.subset is not None and self.subset < 1:
            raise UsageError(f"subset={self.subset} keeps no image")
        if self.seed and self.subset is None:
            raise UsageError(f"seed={self.seed} is not used", why="it chooses a subset", fix="add subset=5000")
        if self.classes == ():
            raise UsageError("classes= names no class")
        if self.verify not in ("headers", "full"):
            raise unknown("way to verify", self.verify, ("headers", "full"))

    def __str__(self) -> str:
        """The options that differ from their defaults, as they stand after the ``?``."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {item.name: values[item.name] for item in fields(self) if values[item.name] != item.default}
        return "&".join(f"{n}={','.join(v) if isinstance(v, tuple) else v}" for n, v in changed.items())

    def only(self, place: object, *used: str) -> None:
        """Refuse ``split`` or ``label`` where this kind of source does not use it."""
        for name in ("split", "label"):
            if name not in used and getattr(self, name) is not None:
                raise UsageError(f"{place}: the option {name}={getattr(self, name)} is not used", fix="leave it out")


def as_option(name: str, value: Any) -> Any:
    """An option's value from text, or from what a caller of the library wrote."""
    names = [item.name for item in fields(Options)]
    if name not in names:
        raise unknown("option of a data source", name, names)
    if value is None:
        return None
    if name == "classes":
        parts = value.split(",") if isinstance(value, str) else value if np.iterable(value) else [value]
        return tuple(str(part).strip() for part in parts)
    if name not in ("resize", "channels", "subset", "seed"):
        if not isinstance(value, str):
            raise UsageError(f"{name}={value!r} is not a text")
        return value
    try:
        if not isinstance(value, bool) and (isinstance(value, str) or int(value) == value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UsageError(f"{name}={value!r} is not a whole number")


# --- rows ----------------------------------------------------------------------------------------------------------


def checked_rows(rows: Rows | slice, size: int) -> Rows:
    """``rows`` as int64 in ``[0, size)``; `IndexError` beyond, for a mask of another length, or no whole numbers."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(size), dtype=np.int64)
    array = np.asarray(rows)
    if array.dtype == bool:
        if array.shape != (size,):
            raise IndexError(f"a mask of {array.size} for {size} rows")
        return np.flatnonzero(array)
    if array.size and array.dtype.kind not in "iu":
        raise IndexError(f"rows are {array.dtype}, not whole numbers")
    if array.size and (array.min() < -size or array.max() >= size):
        raise IndexError(f"rows {array.min()}..{array.max()} of {size}")
    array = array.astype(np.int64)
    return np.where(array < 0, array + size, array)


def blocks(count: int, image_shape: ImageShape) -> Iterator[slice]:
    """Neighbouring rows of ``0..count-1`` that take about 16 MiB, one block after the other."""
    rows = max(1, _BLOCK // math.prod(image_shape))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def stratified_rows(labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """``size`` rows with every class in its share, chosen at random inside each class, in ascending order.

    Shares are rounded by largest remainders: each class is within one row of its own. The same rows on every machine.
    """
    if not 1 <= size <= len(labels):
        what = f"a subset of {size:,} cannot be taken from {len(labels):,} images"
        raise UsageError(what, fix=f"choose 1 to {len(labels)}")
    counts = np.bincount(labels)
    exact = counts * (size / len(labels))
    quota = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - quota), kind="stable")
    quota[order[: size - int(quota.sum())]] += 1
    by_class = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    chosen = [
        by_class[starts[label] + permuted(np.arange(quota[label]), int(counts[label]), mixed_key(seed, label))]
        for label in np.flatnonzero(quota).tolist()
    ]
    return np.sort(np.concatenate(chosen))


# --- readers -------------------------------------------------------------------------------------------------------


def in_memory(array: Pixels) -> Images:
    """Images that lie in memory, uint8 ``[N, H, W, C]``."""
    return Images(array.shape, partial(np.take, array, axis=0))


def selected(images: Images, rows: Rows) -> Images:
    """Some rows of another reader, in the order of ``rows``."""
    read = partial(_chained, partial(np.take, rows), images.read)
    return Images((len(rows), *images.shape[1:]), read, slow=images.slow)


def converted(images: Images, image_shape: ImageShape, convert: Callable[[Pixels], Pixels], *, slow: bool) -> Images:
    """Images of another reader passed through a function of uint8 ``[B, H, W, C]`` that gives ``image_shape``."""
    return Images((images.shape[0], *image_shape), partial(_chained, images.read, convert), slow=slow)


def _chained(first: Callable[[Any], Any], second: Callable[[Any], Pixels], rows: Rows) -> Pixels:
    return second(first(rows))


def joined(parts: Sequence[Images]) -> Images:
    """Several readers of equal image shape, one after the other."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([part.shape[0] for part in parts])
    slow = any(part.slow for part in parts)
    return Images((int(ends[-1]), *parts[0].shape[1:]), partial(_read_joined, tuple(parts), ends), slow=slow)


def _read_joined(parts: Sequence[Images], ends: Rows, rows: Rows) -> Pixels:
    owner = np.searchsorted(ends, rows, side="right")
    out = np.empty((len(rows), *parts[0].shape[1:]), np.uint8)
    for number in np.unique(owner).tolist():
        part: Images = parts[number]
        start = ends[number] - part.shape[0]
        if (mine := owner == number).all():
            return part.read(rows - start)
        out[mine] = part.read(rows[mine] - start)
    return out


class Mapped(Images):
    """uint8 images ``[N, H, W, C]`` that begin at ``offset`` of a file and are read in place; any thread may read.

    Neighbouring rows are read in one piece, with read-ahead, scattered ones one by one without. A map (used where there
    is no ``preadv``) would fault in every row anew, and end the process where the file has been cut short.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], size: int | None = None) -> None:
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
            why = f"it had {self._size:,} bytes and now has {status.st_size:,}, or was written to"
            fix = "leave data files alone while they are in use; run the same command again"
            raise DataError(f"{self._path} has been changed since it was opened", why=why, fix=fix)

    def read(self, rows: Rows) -> Pixels:
        """See `Images.read`; `DataError` where the file has been changed since it was opened."""
        self._check_unchanged()
        if not hasattr(os, "preadv"):
            return np.memmap(self._path, np.uint8, "r", self._offset, self.shape).take(rows, axis=0)
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        if len(rows) > 1 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            self._fill(self._pieces.fileno(), images.reshape(-1).data, int(rows[0]))
        else:
            descriptor = self._rows.fileno()
            for image, row in zip(images.reshape(len(rows), self._row_size), rows.tolist(), strict=True):
                self._fill(descriptor, image.data, row)
        return images

    def _fill(self, descriptor: int, target: memoryview, row: int) -> None:
        start = self._offset + row * self._row_size
        done = os.preadv(descriptor, [target], start)
        while done < len(target):
            got = os.preadv(descriptor, [target[done:]], start + done)
            if not got:
                self._check_unchanged()
                raise DataError(f"{self._path} ends too early", fix="copy it again")
            done += got
