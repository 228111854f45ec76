"""Sources: labelled uint8 images with a name, class names and a fingerprint, and the readers they are made of."""

from __future__ import annotations

import html
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from puma.errors import UsageError

Rows = NDArray[np.int64]
Pixels = NDArray[np.uint8]
ImageShape = tuple[int, int, int]
Shape = tuple[int, int, int, int]
_BLOCK = 16 << 20


class MapStyle(Protocol):
    """A map-style dataset: its items are ``(image, label)``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Images:
    """A reader of N images.

    Args:
        shape: ``(N, H, W, C)``.
        read: what `read` does; a subclass overrides that instead. To survive pickling it is a function of a module or
            a `functools.partial` of one.
        slow: whether images are worth keeping once they are made (decoded, scaled).
    """

    def __init__(
        self, shape: tuple[int, ...], read: Callable[[Rows], Pixels] | None = None, *, slow: bool = False
    ) -> None:
        n, height, width, channels = shape
        self.shape: Shape = (n, height, width, channels)
        self._reader, self.slow = read, slow

    def read(self, rows: Rows) -> Pixels:
        """The images at ``rows`` (int64 in ``[0, N)``, any order, repeats allowed): a fresh uint8 ``[B, H, W, C]``."""
        if self._reader is None:
            raise NotImplementedError
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
        row = checked_row(index, len(self))
        return self.images.read(np.array([row]))[0], int(self.labels[row])

    def read(self, rows: Rows | slice) -> Pixels:
        """Images at ``rows`` (whole numbers, a mask or a slice): uint8 ``[B, H, W, C]``."""
        return self.images.read(checked_rows(rows, len(self)))

    def _repr_html_(self) -> str:
        """For notebooks: a line of facts, and a bar for each class."""
        counts = np.bincount(self.labels, minlength=self.num_classes)
        bars = [
            f"<tr><td>{html.escape(name[:40])}</td><td style='text-align:right'>{count:,}</td><td><div style='height:"
            f".7em;background:#4c78a8;width:{10 * count / counts.max():.1f}em'></div></td></tr>"
            for name, count in zip(self.class_names[:20], counts, strict=False)
        ]
        more = f"<p>and {self.num_classes - 20} more classes</p>" if self.num_classes > 20 else ""
        return f"<p>{html.escape(repr(self)[1:-1])}</p><table>{''.join(bars)}</table>{more}"

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return f"<{self.name}: {len(self):,} images {shape}, {self.num_classes} classes, {self.fingerprint[:12]}>"


def required_spec(source: Source) -> str:
    """The text that opens ``source`` in another process.

    Raises:
        UsageError: it has none, being made of Python objects.
    """
    if source.spec is None:
        raise UsageError(
            f"{source.name} cannot be opened by another process",
            why="it was made from a Python object, so no text names it",
            fix="save it (np.savez(path, image=..., label=...)) and load_dataset that file",
        )
    return source.spec


def checked_row(index: int, size: int) -> int:
    """``index`` as a row in ``[0, size)``; negative counts from the end.

    Raises:
        IndexError: beyond either end (which also ends a ``for`` loop over a source).
        TypeError: not a whole number.
    """
    number = operator.index(index)
    row = number + size if number < 0 else number
    if not 0 <= row < size:
        raise IndexError(f"row {index} of {size}")
    return row


def checked_rows(rows: Rows | slice, size: int) -> Rows:
    """``rows`` as int64 in ``[0, size)``.

    Raises:
        IndexError: a row beyond either end, a boolean mask of another length, or numbers that are not whole.
    """
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
    return np.where(array < 0, array + size, array) if array.size and array.min() < 0 else array


def blocks(count: int, image_shape: ImageShape) -> Iterator[slice]:
    """Neighbouring rows of ``0..count-1`` that take about 16 MiB, one block after the other.

    >>> list(blocks(5, (2048, 4096, 1)))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows = max(1, _BLOCK // math.prod(image_shape))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def in_memory(array: Pixels) -> Images:
    """Images that lie in memory, uint8 ``[N, H, W, C]``."""
    return Images(array.shape, partial(np.take, array, axis=0))


def selected(images: Images, rows: Rows) -> Images:
    """Some rows of another reader, in the order of ``rows``."""
    return Images((len(rows), *images.shape[1:]), partial(_read_selected, images, rows), slow=images.slow)


def joined(parts: Sequence[Images]) -> Images:
    """Several readers of equal image shape, one after the other."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([part.shape[0] for part in parts])
    slow = any(part.slow for part in parts)
    return Images((int(ends[-1]), *parts[0].shape[1:]), partial(_read_joined, tuple(parts), ends), slow=slow)


def converted(
    images: Images, image_shape: ImageShape, convert: Callable[[Pixels], Pixels], *, slow: bool = False
) -> Images:
    """Images of another reader passed through a function of uint8 ``[B, H, W, C]`` that gives ``image_shape``."""
    return Images((images.shape[0], *image_shape), partial(_read_converted, images, convert), slow=slow)


def _read_selected(images: Images, chosen: Rows, rows: Rows) -> Pixels:
    return images.read(chosen[rows])


def _read_converted(images: Images, convert: Callable[[Pixels], Pixels], rows: Rows) -> Pixels:
    return convert(images.read(rows))


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


class Kept(Images):
    """Images that cost something to make, each made once when it is first asked for, and kept in memory."""

    def __init__(self, images: Images) -> None:
        super().__init__(images.shape)
        self._images = images
        self._known = np.zeros(self.shape[0], dtype=bool)
        self._array = np.empty(self.shape, np.uint8)  # the system hands out its pages only as images arrive

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self._images,)  # another process makes its own

    def read(self, rows: Rows) -> Pixels:
        """See `Images.read`."""
        fresh = np.unique(rows[~self._known[rows]])
        if len(fresh):
            self._array[fresh] = self._images.read(fresh)
            self._known[fresh] = True
        out: Pixels = np.take(self._array, rows, axis=0)
        return out
