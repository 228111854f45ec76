"""Checks of images, labels and classes; errors say what was found and what mends it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError

LABEL_NAMES = ("label", "labels", "y", "targets")
_TYPE_LIMIT = 32_767  # labels are int16 in every table
_CHANNELS = (1, 3)
_NO_CAST = "images are uint8 in 0..255; nothing is cast silently"


def check_image_layout(
    shape: Sequence[int], dtype: np.dtype[np.generic], sample: NDArray[np.generic] | None, where: str
) -> None:
    """Refuse everything but uint8 ``[N, H, W, C]`` with 1 or 3 channels.

    Args:
        shape: of the whole array.
        dtype: of the array.
        sample: some of the values, to tell float ranges apart; None where none can be read.
        where: what to call the array in messages ("edm.npz: image").

    Raises:
        DataError: with the exact mismatch and the line of numpy that mends it.
    """
    seen = f"{where} has shape {_text(shape)}"
    if dtype.hasobject:
        why = "reading them would run code from the file"
        raise DataError(f"{where} holds Python objects", why=why, fix="save a plain uint8 array")
    if len(shape) == 3:
        raise DataError(f"{seen}, without a channel axis", fix="save images[..., None]: [N, H, W, 1]")
    if len(shape) != 4:
        raise DataError(seen, why="images are [N, H, W, C]")
    if shape[3] not in _CHANNELS and shape[1] in _CHANNELS:
        fix = "save images.transpose(0, 2, 3, 1)"
        raise DataError(f"{seen}, which is NCHW", why="images are [N, H, W, C]", fix=fix)
    if shape[3] not in _CHANNELS:
        raise DataError(f"{seen}: {shape[3]} channels", why="1 (grey) or 3 (RGB) are understood")
    if 0 in shape:
        raise DataError(f"{seen}: there is no image in it")
    if dtype == np.uint8:
        return
    if dtype.kind == "f":
        raise _float_error(dtype, sample, where)
    if dtype.kind in "iu" and dtype.itemsize == 2:
        fix = "save (images >> 8).astype(np.uint8) if they fill 16 bits"
        raise DataError(f"{where} is {dtype}: 16-bit images", why="images are uint8 in 0..255", fix=fix)
    raise DataError(f"{where} is {dtype}", why=_NO_CAST, fix="save images.astype(np.uint8) if the values are 0..255")


def check_labels(
    labels: NDArray[np.generic], images: int, where: str, class_names: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Return ``labels`` as int64 ``[N]`` after refusing whatever is not a class number.

    Args:
        labels: any integer type.
        images: how many images they belong to.
        where: what to call them in messages.
        class_names: the classes that exist, where the file says so.

    Raises:
        DataError: wrong type or shape, another length than the images, a label out of range.
    """
    if labels.ndim != 1:
        one_hot = labels.ndim == 2 and 1 not in labels.shape and labels.shape[0] == images
        raise DataError(
            f"{where} has shape {_text(labels.shape)}{': one-hot labels?' if one_hot else ''}",
            why="labels are class numbers [N]",
            fix=f"save labels.{'argmax(1)' if one_hot else 'reshape(-1)'}",
        )
    if labels.dtype.kind not in "iu":
        why = "labels are whole class numbers; nothing is cast silently"
        raise DataError(f"{where} is {labels.dtype}", why=why, fix="save labels.astype(np.int64)")
    if len(labels) != images:
        raise DataError(f"{where}: {len(labels):,} labels for {images:,} images")
    low, high = int(labels.min()), int(labels.max())
    limit = _TYPE_LIMIT if class_names is None else len(class_names) - 1
    if low < 0 or high > limit:
        bad = low if low < 0 else high
        row = int(np.flatnonzero(labels == bad)[0])
        raise DataError(f"{where}: label {bad} at row {row:,} is out of range", why=f"labels are 0..{limit}")
    return np.ascontiguousarray(labels, dtype=np.int64)


def check_classes(labels: NDArray[np.int64], where: str, class_names: Sequence[str] | None = None) -> None:
    """Refuse a source in which a class has no image.

    Raises:
        DataError: names the empty classes and the option that leaves them out.
    """
    counts = np.bincount(labels, minlength=len(class_names or ()))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return
    called = [str(number) if class_names is None else class_names[number] for number in empty[:5]]
    names = ", ".join(name if name == str(n) else f"{n} ({name})" for n, name in zip(empty, called, strict=False))
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    present = ",".join(str(number) for number in np.flatnonzero(counts)[:12])
    raise DataError(
        f"{where}: no image of class {names}{more}",
        why="every class needs images; class numbers run from 0 without gaps",
        fix=f"choose the classes that are there: ?classes={present} (they are renumbered from 0)",
    )


def _float_error(dtype: np.dtype[np.generic], sample: NDArray[np.generic] | None, where: str) -> DataError:
    if sample is None or not sample.size or not np.isfinite(sample).all():
        return DataError(f"{where} is {dtype}, with values that are not finite", why=_NO_CAST)
    low, high = float(np.min(sample)), float(np.max(sample))
    for floor, ceiling, line in (
        (0, 1, "(images * 255).round().astype(np.uint8)"),
        (0, 255, "images.round().astype(np.uint8)"),
        (-1, 1, "(images * 127.5 + 127.5).round().astype(np.uint8)"),
    ):
        if low >= floor and high <= ceiling:
            return DataError(f"{where} is {dtype} in {floor}..{ceiling}", why=_NO_CAST, fix=f"save {line}")
    seen = f"{where} is {dtype} in {low:.3g}..{high:.3g}: normalised?"
    return DataError(seen, why=_NO_CAST, fix="save the pixels before normalisation")


def _text(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
