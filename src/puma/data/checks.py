"""Checks of images, labels and classes; facts about a source: counts, order of labels, pixels, equal images."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puma.data.source import Rows, Source, blocks
from puma.errors import DataError, UsageError, unknown
from puma.io import fingerprint
from puma.progress import Progress

logger = logging.getLogger("puma")

LABEL_NAMES = ("label", "labels", "y", "targets", "cls")  # the last: of webdataset tars
_BOMB_RATIO, _BOMB_SIZE = 100, 64 << 20
_TYPE_LIMIT = 32_767  # labels are int16 in every table
_FLOATS = (  # the narrowest range that holds the values comes last
    (-1, 1, "(images * 127.5 + 127.5).round().astype(np.uint8)"),
    (0, 255, "images.round().astype(np.uint8)"),
    (0, 1, "(images * 255).round().astype(np.uint8)"),
)


def check_image_layout(
    shape: Sequence[int], dtype: np.dtype[np.generic], sample: NDArray[np.generic] | None, where: str
) -> None:
    """Refuse (`DataError`, with the line of numpy that mends it) all but uint8 ``[N, H, W, C]`` with 1 or 3 channels.

    ``sample`` holds some of the values, to tell float ranges apart.
    """
    wrong = fix = ""
    if len(shape) == 3:
        wrong, fix = ", without a channel axis", "save images[..., None]: [N, H, W, 1]"
    elif len(shape) == 4 and shape[3] not in (1, 3):
        transposed = shape[1] in (1, 3)
        wrong = ", which is NCHW" if transposed else f": {shape[3]} channels"
        fix = "save images.transpose(0, 2, 3, 1)" if transposed else ""
    elif 0 in shape:
        wrong = ": there is no image in it"
    if wrong or len(shape) != 4:
        why = "images are [N, H, W, C] with 1 (grey) or 3 (RGB) channels"
        raise DataError(f"{where} has shape [{', '.join(map(str, shape))}]{wrong}", why=why, fix=fix)
    if dtype == np.uint8:
        return
    seen, fix = "", "save images.astype(np.uint8) if the values are 0..255"
    if dtype.kind in "iu" and dtype.itemsize == 2:
        seen, fix = ": 16-bit images", "save (images >> 8).astype(np.uint8) if they fill 16 bits"
    elif dtype.kind == "f" and (sample is None or not sample.size or not np.isfinite(sample).all()):
        seen, fix = ", with values that are not finite", ""
    elif dtype.kind == "f" and sample is not None:
        low, high = float(np.min(sample)), float(np.max(sample))
        seen, fix = f" in {low:.3g}..{high:.3g}: normalised?", "save the pixels before normalisation"
        for floor, ceiling, line in _FLOATS:
            if low >= floor and high <= ceiling:
                seen, fix = f" in {floor}..{ceiling}", f"save {line}"
    raise DataError(f"{where} is {dtype}{seen}", why="images are uint8 in 0..255; nothing is cast silently", fix=fix)


def check_labels(
    labels: NDArray[np.generic], images: int, where: str, class_names: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """``labels``, integers of any type and one for each of ``images`` images, as int64 ``[N]`` (else `DataError`)."""
    if labels.ndim != 1:
        one_hot = labels.ndim == 2 and 1 not in labels.shape and labels.shape[0] == images
        what = f"{where} has shape [{', '.join(map(str, labels.shape))}]{': one-hot labels?' if one_hot else ''}"
        fix = f"save labels.{'argmax(1)' if one_hot else 'reshape(-1)'}"
        raise DataError(what, why="labels are class numbers [N]", fix=fix)
    if labels.dtype.kind not in "iu":
        why = "labels are whole class numbers; nothing is cast silently"
        fix = "save labels.astype(np.int64)"
        if labels.dtype.kind not in "bf":  # texts; an .npz takes the names too
            fix = "save names, labels = np.unique(np.array(labels, str), return_inverse=True) as class_names and label"
        raise DataError(f"{where} is {labels.dtype}", why=why, fix=fix)
    if len(labels) != images:
        raise DataError(f"{where}: {len(labels):,} labels for {images:,} images", fix="save one label for each image")
    limit = _TYPE_LIMIT if class_names is None else len(class_names) - 1
    for bad in (int(labels.min()), int(labels.max())):
        if not 0 <= bad <= limit:
            row = int(np.flatnonzero(labels == bad)[0])
            raise DataError(f"{where}: label {bad} at row {row:,} is out of range", why=f"labels are 0..{limit}")
    return np.ascontiguousarray(labels, dtype=np.int64)


def check_unfolding(what: str, held: int, claimed: int) -> None:
    """Refuse data of which ``held`` bytes claim to unfold into over 100 times as many: no real images do."""
    if claimed > max(_BOMB_SIZE, _BOMB_RATIO * held):
        why = f"more than {_BOMB_RATIO} times: no real images compress like that, so it is refused as a bomb"
        fix = "save it uncompressed (np.savez) where you trust it"
        raise DataError(f"{what} claims to unfold {held:,} bytes into {claimed:,}", why=why, fix=fix)


def check_classes(labels: NDArray[np.int64], where: str, class_names: Sequence[str]) -> None:
    """Refuse a source in which a class has no image; the `DataError` names the option that leaves it out."""
    counts = np.bincount(labels, minlength=len(class_names))
    if not counts.all():
        empty = [f"{n} ({name})" if name != str(n) else name for n, name in enumerate(class_names) if not counts[n]]
        what = f"{where}: no image of class {', '.join(empty[:5] + ['...'] * (len(empty) > 5))}"
        present = ",".join(map(str, np.flatnonzero(counts)[:12]))
        why = "every class needs images; class numbers run from 0 without gaps"
        fix = f"choose the classes that are there: ?classes={present} (they are renumbered from 0)"
        raise DataError(what, why=why, fix=fix)


def chosen_label(names: Sequence[str], also: Iterable[str], asked: str | None, where: str) -> str:
    """Which of the columns ``names`` holds the labels: ``asked``, or the only one that is called so or is in ``also``.

    `UsageError` where ``asked`` is not there, or where several can and none was asked for; `DataError` where none can.
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


def chosen_split(path: Path | str, split: str | None, splits: Sequence[str]) -> str:
    """``split``, or a `UsageError` that lists those that ``path`` holds."""
    if split is None:
        train = next((name for name in splits if "train" in name.lower()), splits[-1])
        fix = f'choose one: "{path}?split={train}" (Python: split="{train}")'
        raise UsageError(f"{path} holds the splits {', '.join(splits)}", fix=fix)
    if split not in splits:
        raise unknown(f"split of {path}", split, splits)
    return split


def match_classes(source: Source, class_names: Sequence[str], whose: str) -> Source:
    """``source`` with its labels numbered as in ``class_names``, the classes of ``whose`` (else `DataError`): by name.

    Names ``"0", "1", ...`` are what a source without names has: such labels are taken by number, unless some of the
    other names are numbers too.
    """
    own, wanted = _canonical(source.class_names), _canonical(class_names)
    if own == wanted[: len(own)]:
        return source
    unnamed = any(names == [str(number) for number in range(len(names))] for names in (own, wanted))
    if unnamed and len(own) > len(wanted):
        what = f"{source.name} has {len(own)} classes, {whose} has {len(wanted)}"
        raise DataError(what, why="labels have to mean the same everywhere")
    if unnamed and not all(any(map(number_in, names)) for names in (own, wanted)):
        return source
    if lacking := [name for name in own if name not in wanted]:
        common = ",".join(name for name in source.class_names if name not in lacking)
        what = f"{source.name} has classes that {whose} does not have: {', '.join(lacking[:5])}"
        why = f"labels have to mean the same everywhere; {whose} has: {', '.join(class_names[:8])}"
        fix = f"leave them out with ?classes={common}" if common else "choose the data that belongs to it"
        raise DataError(what, why=why, fix=fix)
    table = np.array([wanted.index(name) for name in own], np.int64)
    moved = ", ".join(f"{name} {n} -> {table[n]}" for n, name in enumerate(source.class_names) if n != table[n])
    logger.warning("the classes of %s are matched with those of %s by name: %s", source.name, whose, moved)
    digest = fingerprint({"of": source.fingerprint, "classes": wanted})
    made = Source(source.images, table[source.labels], name=source.name, fingerprint=digest, class_names=class_names)
    made.spec = source.spec
    return made


def _canonical(names: Sequence[str]) -> list[str]:
    """Names without white space around them; numbers as such ("07" and "7.0" are "7") where all are, each once."""
    stripped = [name.strip() for name in names]
    numbers = [number for name in stripped if (number := number_in(name))]
    return numbers if len(set(numbers)) == len(names) else stripped


def number_in(name: str) -> str:
    """A name that is a number, hexadecimal, of any script, with any sign, in its shortest form; else an empty text."""
    try:
        value = float(int(name, 16) if name[:2] in ("0x", "0X") else name if "_" not in name else "nan")
    except (ValueError, OverflowError):
        return ""
    return f"{value:g}" if value.is_integer() and abs(value) < 1e6 else f"{value!r}" if math.isfinite(value) else ""


# --- facts about a source ------------------------------------------------------------------------------------------


def label_runs(labels: NDArray[np.int64]) -> tuple[int, float]:
    """The longest run of one label, and about what it would be in random order."""
    longest = int(np.diff(np.flatnonzero(np.diff(labels, prepend=-1, append=-1))).max())
    share = np.bincount(labels).max() / len(labels)
    return longest, math.log(len(labels)) / -math.log(share) if share < 1 else float(len(labels))


def image_hashes(source: Source, *, progress: bool = False) -> NDArray[np.uint64]:
    """A 64-bit hash of each image's pixels (BLAKE2b), uint64 ``[N]``, in one pass over the source."""
    out = np.empty(len(source), np.uint64)
    with Progress(f"reading {source.name}", len(source), "images", show=progress) as bar:
        for rows in blocks(len(source), source.image_shape):
            for row, image in enumerate(source.read(rows), start=rows.start):
                out[row] = int.from_bytes(hashlib.blake2b(image.data, digest_size=8).digest(), "little")
            bar.advance(rows.stop - rows.start)
    return out


def equal_images(hashes: NDArray[np.uint64], others: NDArray[np.uint64] | None = None) -> tuple[Rows, Rows]:
    """Rows whose image occurs among ``others`` (None: earlier among themselves); for each the first such row there."""
    values, first = np.unique(hashes if others is None else others, return_index=True)
    places = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
    earlier = first[places] != np.arange(len(hashes)) if others is None else True
    rows = np.flatnonzero((values[places] == hashes) & earlier)
    return rows, first[places[rows]]
