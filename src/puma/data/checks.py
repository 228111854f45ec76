"""Checks of images, labels and classes; facts about a source: counts, order of labels, pixels, equal images."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puma.data.source import Rows, Source, blocks, stratified_rows
from puma.errors import DataError, UsageError, unknown
from puma.io import fingerprint
from puma.progress import Progress
from puma.rng import mixed_key, permuted

logger = logging.getLogger("puma")

LABEL_NAMES = ("label", "labels", "y", "targets")
_BOMB_RATIO, _BOMB_SIZE = 100, 64 << 20
_SAMPLE, _LEAST, _SAMPLE_SIZE = 10_000, 1_000, 1 << 30
_TYPE_LIMIT = 32_767  # labels are int16 in every table
_CHANNELS = (1, 3)
_NO_CAST = "images are uint8 in 0..255; nothing is cast silently"


def check_image_layout(
    shape: Sequence[int], dtype: np.dtype[np.generic], sample: NDArray[np.generic] | None, where: str
) -> None:
    """Refuse (`DataError`, with the line of numpy that mends it) all but uint8 ``[N, H, W, C]`` with 1 or 3 channels.

    ``sample`` holds some of the values, to tell float ranges apart.
    """
    seen = f"{where} has shape {_text(shape)}"
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
        raise DataError(f"{where} is {dtype}: 16-bit images", why=_NO_CAST, fix=fix)
    if dtype.kind != "f":
        fix = "save images.astype(np.uint8) if the values are 0..255"
        raise DataError(f"{where} is {dtype}", why=_NO_CAST, fix=fix)
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
    """``labels``, integers of any type and one for each of ``images`` images, as int64 ``[N]`` (else `DataError`)."""
    if labels.ndim != 1:
        one_hot = labels.ndim == 2 and 1 not in labels.shape and labels.shape[0] == images
        what = f"{where} has shape {_text(labels.shape)}{': one-hot labels?' if one_hot else ''}"
        fix = f"save labels.{'argmax(1)' if one_hot else 'reshape(-1)'}"
        raise DataError(what, why="labels are class numbers [N]", fix=fix)
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


def check_unfolding(what: str, held: int, claimed: int) -> None:
    """Refuse data of which ``held`` bytes claim to unfold into over 100 times as many: no real images do."""
    if claimed > max(_BOMB_SIZE, _BOMB_RATIO * held):
        why = f"more than {_BOMB_RATIO} times: no real images compress like that, so it is refused as a bomb"
        fix = "save it uncompressed (np.savez) where you trust it"
        raise DataError(f"{what} claims to unfold {held:,} bytes into {claimed:,}", why=why, fix=fix)


def check_classes(labels: NDArray[np.int64], where: str, class_names: Sequence[str]) -> None:
    """Refuse a source in which a class has no image; the `DataError` names the option that leaves it out."""
    counts = np.bincount(labels, minlength=len(class_names))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return
    names = ", ".join(str(n) if class_names[n] == str(n) else f"{n} ({class_names[n]})" for n in empty[:5])
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    present = ",".join(map(str, np.flatnonzero(counts)[:12]))
    why = "every class needs images; class numbers run from 0 without gaps"
    fix = f"choose the classes that are there: ?classes={present} (they are renumbered from 0)"
    raise DataError(f"{where}: no image of class {names}{more}", why=why, fix=fix)


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


def chosen_split(path: Path, split: str | None, splits: Sequence[str]) -> str:
    """``split``, or a `UsageError` that lists those that ``path`` holds."""
    if split is None:
        train = next((name for name in splits if "train" in name.lower()), splits[-1])
        raise UsageError(f"{path} holds the splits {', '.join(splits)}", fix=f'choose one: "{path}?split={train}"')
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
        what = f"{source.name} has classes that {whose} does not have: {', '.join(lacking[:5])}"
        fix = f"leave them out with ?classes={common}" if common else "choose the data that belongs to it"
        raise DataError(what, why=f"{why}; {whose} has: {', '.join(class_names[:8])}", fix=fix)
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


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


# --- facts about a source ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Images of each class, the longest run of one label (and about what it would be in random order); of ``sampled``
    images mean and std of each channel in 0..1, extreme pixels in 0..255, and how many are one colour throughout.
    """

    counts: NDArray[np.int64]
    longest_run: int
    expected_run: float
    sampled: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    low: int
    high: int
    flat: int

    @property
    def ordered(self) -> bool:
        """Whether the labels come in runs that chance does not make: a prefix is then no sample."""
        return len(self.counts) > 1 and self.longest_run > 4 * self.expected_run + 8


def summarize(source: Source) -> Summary:
    """Look at all labels and at a stratified sample of 10,000 images, fewer where these take over 1 GiB."""
    labels = source.labels
    counts = np.bincount(labels, minlength=source.num_classes)
    changes = np.flatnonzero(np.diff(labels)) + 1
    runs = np.diff(np.concatenate([[0], changes, [len(labels)]]))
    share = counts.max() / len(labels)
    expected = math.log(len(labels)) / -math.log(share) if 0 < share < 1 else float(len(labels))
    sample = min(_SAMPLE, max(_LEAST, _SAMPLE_SIZE // math.prod(source.image_shape)), len(labels))
    rows = stratified_rows(labels, sample, seed=0)
    channels = source.image_shape[2]
    seen, flat = np.zeros((channels, 256), np.int64), 0  # how often each value occurs in each channel
    for block in blocks(len(rows), source.image_shape):
        pixels = source.read(rows[block])
        for channel in range(channels):
            seen[channel] += np.bincount(pixels[..., channel].reshape(-1), minlength=256)
        each = pixels.reshape(len(pixels), -1, channels)
        flat += int((each == each[:, :1]).all((1, 2)).sum())
    values = np.arange(256) / 255
    shares = seen / seen.sum(1, keepdims=True)
    mean = shares @ values
    std = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))
    present = np.flatnonzero(seen.sum(0))
    return Summary(counts, int(runs.max()), expected, len(rows), mean, std, int(present[0]), int(present[-1]), flat)


@dataclass(frozen=True)
class Duplicates:
    """Images that occur in another source (or earlier in their own), pixel for pixel.

    Their rows, ascending; the first row with the same pixels for each; how many carry another label than their twin.
    """

    rows: NDArray[np.int64]
    twins: NDArray[np.int64]
    conflicts: int

    def __len__(self) -> int:
        return len(self.rows)


def image_hashes(source: Source, *, progress: bool = False) -> NDArray[np.uint64]:
    """A 64-bit hash of each image's pixels (BLAKE2b), uint64 ``[N]``, in one pass over the source."""
    out = np.empty(len(source), np.uint64)
    with Progress(f"reading {source.name}", len(source), "images", show=progress) as bar:
        for rows in blocks(len(source), source.image_shape):
            for row, image in enumerate(source.read(rows), start=rows.start):
                out[row] = int.from_bytes(hashlib.blake2b(image.data, digest_size=8).digest(), "little")
            bar.advance(rows.stop - rows.start)
    return out


def repeated(source: Source, hashes: NDArray[np.uint64]) -> Duplicates:
    """Images of ``source`` that are equal to an earlier one of it."""
    _, first, places = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[places]
    rows = np.flatnonzero(earlier != np.arange(len(hashes)))
    return _confirmed(source, rows, source, earlier[rows])


def shared(source: Source, hashes: NDArray[np.uint64], other: Source, other_hashes: NDArray[np.uint64]) -> Duplicates:
    """Images of ``source`` that occur in ``other``."""
    if source.image_shape != other.image_shape:
        return Duplicates(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    values, first = np.unique(other_hashes, return_index=True)
    places = np.minimum(np.searchsorted(values, hashes), len(values) - 1)
    rows = np.flatnonzero(values[places] == hashes)
    return _confirmed(source, rows, other, first[places[rows]])


def _confirmed(source: Source, rows: Rows, other: Source, twins: Rows) -> Duplicates:
    """Only the pairs whose pixels are equal, not just their hashes."""
    equal = np.zeros(len(rows), dtype=bool)
    for block in blocks(len(rows), source.image_shape):
        one, two = source.read(rows[block]), other.read(twins[block])
        equal[block] = (one == two).reshape(len(one), -1).all(1)
    rows, twins = rows[equal], twins[equal]
    return Duplicates(rows, twins, int((source.labels[rows] != other.labels[twins]).sum()))


def contact_sheet(source: Source, per_class: int = 10, seed: int = 0) -> bytes:
    """A PNG of ``per_class`` random images of each class, one class a row (40 spread over all where there are more)."""
    from matplotlib.figure import Figure

    classes = np.unique(np.linspace(0, source.num_classes - 1, min(source.num_classes, 40)).astype(int)).tolist()
    height, width, channels = source.image_shape
    sheet = np.full((len(classes), height + 1, per_class, width + 1, channels), 255, np.uint8)
    for line, number in enumerate(classes):
        rows = np.flatnonzero(source.labels == number)
        places = permuted(np.arange(min(per_class, len(rows))), len(rows), mixed_key(seed, number))
        sheet[line, :height, : len(places), :width] = source.read(rows[places]).swapaxes(0, 1)
    picture = sheet.reshape(len(classes) * (height + 1), per_class * (width + 1), channels)
    cell = max(0.7, max(height, width) / 100)  # inches, at 100 pixels an inch
    figure = Figure(figsize=(2 + cell * per_class, 0.5 + cell * len(classes)), layout="constrained", dpi=100)
    axes = figure.add_subplot(xticks=[], yticks=(np.arange(len(classes)) + 0.5) * (height + 1))
    axes.imshow(np.repeat(picture, 3 // channels, axis=2), interpolation="nearest")
    texts = [f"{source.class_names[number][:24]}  {(source.labels == number).sum():,}" for number in classes]
    axes.set_yticklabels(texts, parse_math=False)
    axes.set_title(f"{source.name}: {len(source):,} images {width}x{height}", parse_math=False)
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()
