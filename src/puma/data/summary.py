"""Facts about a source: counts, order of its labels, statistics of its pixels, equal images, a contact sheet."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from puma.data.sampler import stratified_rows
from puma.data.source import Rows, Source, blocks
from puma.progress import Progress
from puma.rng import mixed_key, permuted

_SAMPLE, _LEAST, _SAMPLE_SIZE = 10_000, 1_000, 1 << 30
_SHOWN, _GAP, _TITLE, _INK = 64, 4, 22, (30, 30, 30)


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
    classes = np.unique(np.linspace(0, source.num_classes - 1, min(source.num_classes, 40)).astype(int))
    height, width, _ = source.image_shape
    factor = max(1, _SHOWN // max(height, width))  # small images are enlarged by a whole factor
    font = ImageFont.load_default(13)
    texts = [f"{source.class_names[number][:24]}  {(source.labels == number).sum():,}" for number in classes]
    title = f"{source.name}: {len(source):,} images {width}x{height}, {source.num_classes} classes"
    side = int(max(map(font.getlength, texts))) + 2 * _GAP
    step_x, step_y = width * factor + _GAP, height * factor + _GAP
    sheet_width = max(side + per_class * step_x, int(font.getlength(title)) + _GAP) + _GAP
    sheet = Image.new("RGB", (sheet_width, _TITLE + len(classes) * step_y + _GAP), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, fill=_INK, font=font)
    for line, (number, text) in enumerate(zip(classes, texts, strict=True)):
        top = _TITLE + line * step_y
        pen.text((_GAP, top + step_y / 2), text, fill=_INK, font=font, anchor="lm")
        rows = np.flatnonzero(source.labels == number)
        places = permuted(np.arange(min(per_class, len(rows))), len(rows), mixed_key(seed, int(number)))
        for column, image in enumerate(source.read(rows[places])):
            tile = np.repeat(np.repeat(image, factor, 0), factor, 1)
            sheet.paste(Image.fromarray(tile[..., 0] if tile.shape[2] == 1 else tile), (side + column * step_x, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
