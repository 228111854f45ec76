"""Checks of images, labels and classes; errors say what was found and what mends it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from puma.data.source import Source
from puma.errors import DataError, UsageError, unknown
from puma.io import fingerprint

logger = logging.getLogger("puma")

LABEL_NAMES = ("label", "labels", "y", "targets")
_TYPE_LIMIT = 32_767  # labels are int16 in every table
_CHANNELS = (1, 3)
_NO_CAST = "images are uint8 in 0..255; nothing is cast silently"


def check_image_layout(
    shape: Sequence[int], dtype: np.dtype[np.generic], sample: NDArray[np.generic] | None, where: str
) -> None:
    """Refuse (`DataError`, with the line of numpy that mends it) all but uint8 ``[N, H, W, C]`` with 1 or 3 channels.

    ``sample`` holds some of the values, to tell float ranges apart; ``where`` names the array in messages.
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
    if dtype.kind in "iu" and dtype.itemsize == 2:
        fix = "save (images >> 8).astype(np.uint8) if they fill 16 bits"
        raise DataError(f"{where} is {dtype}: 16-bit images", why="images are uint8 in 0..255", fix=fix)
    if dtype.kind != "f":
        raise DataError(
            f"{where} is {dtype}", why=_NO_CAST, fix="save images.astype(np.uint8) if the values are 0..255"
        )
    if sample is None or not sample.size or not np.isfinite(sample).all():
        raise DataError(f"{where} is {dtype}, with values that are not finite", why=_NO_CAST)
    low, high = float(np.min(sample)), float(np.max(sample))
    for floor, ceiling, line in (
        (0, 1, "(images * 255).round().astype(np.uint8)"),
        (0, 255, "images.round().astype(np.uint8)"),
        (-1, 1, "(images * 127.5 + 127.5).round().astype(np.uint8)"),
    ):
        if low >= floor and high <= ceiling:
            raise DataError(f"{where} is {dtype} in {floor}..{ceiling}", why=_NO_CAST, fix=f"save {line}")
    seen = f"{where} is {dtype} in {low:.3g}..{high:.3g}: normalised?"
    raise DataError(seen, why=_NO_CAST, fix="save the pixels before normalisation")


def check_labels(
    labels: NDArray[np.generic], images: int, where: str, class_names: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Return ``labels``, one for each of ``images`` images and of any integer type, as int64 ``[N]``.

    Raises:
        DataError: wrong type or shape, another length, a label out of range (of ``class_names`` where they are known).
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
        raise DataError(f"{where}: {len(labels):,} labels for {images:,} images", fix="save one label for each image")
    low, high = int(labels.min()), int(labels.max())
    limit = _TYPE_LIMIT if class_names is None else len(class_names) - 1
    if low < 0 or high > limit:
        bad = low if low < 0 else high
        row = int(np.flatnonzero(labels == bad)[0])
        raise DataError(f"{where}: label {bad} at row {row:,} is out of range", why=f"labels are 0..{limit}")
    return np.ascontiguousarray(labels, dtype=np.int64)


def check_classes(labels: NDArray[np.int64], where: str, class_names: Sequence[str]) -> None:
    """Refuse a source in which a class has no image; the `DataError` names the option that leaves it out."""
    counts = np.bincount(labels, minlength=len(class_names))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return
    names = ", ".join(str(n) if class_names[n] == str(n) else f"{n} ({class_names[n]})" for n in empty[:5])
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    present = ",".join(map(str, np.flatnonzero(counts)[:12]))
    raise DataError(
        f"{where}: no image of class {names}{more}",
        why="every class needs images; class numbers run from 0 without gaps",
        fix=f"choose the classes that are there: ?classes={present} (they are renumbered from 0)",
    )


def chosen_label(names: Sequence[str], also: Iterable[str], asked: str | None, where: str) -> str:
    """Which of the columns ``names`` of ``where`` holds the labels: ``asked``, or the only one that can.

    A column can if it is called so or is among ``also``. `UsageError` where ``asked`` is not there or several can and
    none was asked for; `DataError` where none can.
    """
    if asked is not None:
        if asked not in names:
            raise unknown(f"label column of {where}", asked, names)
        return asked
    found = [name for name in names if name in LABEL_NAMES or name in also]
    if not found:
        fix = "name the one that holds the labels: ?label=NAME"
        raise DataError(f"{where} has no column 'label'", why=f"it has: {', '.join(names) or 'nothing'}", fix=fix)
    if len(found) > 1:
        columns = ", ".join(found)
        raise UsageError(f"{where} has several label columns: {columns}", fix=f"choose one: ?label={found[0]}")
    return found[0]


def match_classes(source: Source, class_names: Sequence[str], whose: str) -> Source:
    """``source`` with its labels numbered as in ``class_names``, the classes of ``whose``: matched by name.

    Names ``"0", "1", ...`` are what a source without names has: such labels are taken by number, unless some of the
    other names are numbers too. ``source`` itself is returned where nothing has to be renumbered.

    Raises:
        DataError: ``source`` has classes that ``class_names`` lacks.
    """
    own, wanted = _canonical(source.class_names), _canonical(class_names)
    if own == wanted[: len(own)]:
        return source
    numbered = [names == [str(number) for number in range(len(names))] for names in (own, wanted)]
    numbers = [any(map(number_in, names)) for names in (own, wanted)]
    why = "labels have to mean the same everywhere"
    if len(own) > len(wanted) and any(numbered):
        raise DataError(f"{source.name} has {len(own)} classes, {whose} has {len(wanted)}", why=why)
    if any(numbered) and not all(numbers):
        return source
    lacking = [name for name in own if name not in wanted]
    if lacking:
        common = ",".join(name for name in source.class_names if name not in lacking)
        raise DataError(
            f"{source.name} has classes that {whose} does not have: {', '.join(lacking[:5])}",
            why=f"{why}; {whose} has: {', '.join(class_names[:8])}",
            fix=f"leave them out with ?classes={common}" if common else "choose the data that belongs to it",
        )
    table = np.array([wanted.index(name) for name in own], np.int64)
    moved = ", ".join(f"{name} {n} -> {table[n]}" for n, name in enumerate(source.class_names) if n != table[n])
    logger.warning("the classes of %s are matched with those of %s by name: %s", source.name, whose, moved)
    return Source(
        source.images,
        table[source.labels],
        name=source.name,
        fingerprint=fingerprint({"of": source.fingerprint, "classes": wanted}),
        class_names=class_names,
        spec=source.spec,
    )


def _canonical(names: Sequence[str]) -> list[str]:
    """Names without white space around them; numbers as such ("07" and "7.0" are "7") where all are, each once."""
    stripped = [name.strip() for name in names]
    numbers = [number for name in stripped if (number := number_in(name))]
    return numbers if len(set(numbers)) == len(names) else stripped


def number_in(name: str) -> str:
    """A name that is a number, of any script and with any sign, in its shortest form; else an empty text."""
    try:
        value = float(name if "_" not in name else "nan")
    except ValueError:
        return ""
    return f"{value:g}" if value.is_integer() and abs(value) < 1e6 else f"{value!r}" if math.isfinite(value) else ""


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
