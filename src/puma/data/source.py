"""A source: images and labels with a name, class names and a fingerprint."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from puma.data.images import Images, Rows
from puma.errors import UsageError


@runtime_checkable
class Source(Protocol):
    """What the rest of PUMA reads images from. A `Pool` is one too.

    ``source[i]`` is ``(uint8 [H, W, C], int)``; ``source.read(rows)`` gives many images at once.
    """

    @property
    def name(self) -> str:
        """A short name for tables and pictures."""
        ...

    @property
    def spec(self) -> str | None:
        """The text from which another process can open the same source; None where there is none."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 ``[N]``, each in ``[0, num_classes)``."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each class."""
        ...

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(H, W, C)``."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 that tells this data from other data, independent of where the file lies."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]: ...

    def read(self, rows: Rows | slice) -> NDArray[np.uint8]:
        """Images at ``rows`` (an int64 array or a slice): uint8 ``[B, H, W, C]``."""
        ...


class ImageSource:
    """A source made of a reader of images and an array of labels.

    Args:
        images: the reader.
        labels: int64 ``[N]``, checked by `puma.data.layout`.
        name: short name.
        fingerprint: hex SHA-256.
        class_names: one for each class; default ``"0", "1", ...``.
        spec: text that opens the same source in another process.
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
        classes = int(labels.max()) + 1 if class_names is None else len(class_names)
        self.class_names = tuple(class_names or (str(number) for number in range(classes)))
        self.num_classes = len(self.class_names)
        self.image_shape: tuple[int, int, int] = images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        row = checked_row(index, len(self))
        return self.images.read(np.array([row]))[0], int(self.labels[row])

    def read(self, rows: Rows | slice) -> NDArray[np.uint8]:
        """See `Source.read`."""
        return self.images.read(checked_rows(rows, len(self)))

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        return (
            f"<{self.name}: {len(self):,} images {height}x{width}x{channels}, {self.num_classes} classes, "
            f"{self.fingerprint[:12]}>"
        )


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
    """``index`` as a row in ``[0, size)``; negative counts from the end, as everywhere in Python.

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
