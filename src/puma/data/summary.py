"""What a source holds: counts per class, order of its labels, statistics of its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puma.data.images import blocks
from puma.data.source import Source
from puma.data.stratified import stratified_rows

_SAMPLE, _LEAST, _SAMPLE_SIZE = 10_000, 1_000, 1 << 30


@dataclass(frozen=True)
class Summary:
    """Facts about a source.

    Args:
        counts: int64 ``[num_classes]``, images of each class.
        longest_run: most neighbouring rows with one label.
        expected_run: about the longest run of as many labels in random order.
        sampled: from how many images (stratified, seed 0) the pixel statistics come.
        mean: float64 ``[C]``, mean pixel, 0..1.
        std: float64 ``[C]``, standard deviation of all pixels, 0..1.
        low: smallest pixel, 0..255.
        high: largest pixel, 0..255.
        flat: how many of the sampled images are one colour throughout.
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


def summarise(source: Source) -> Summary:
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
