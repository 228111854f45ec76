"""Make the images of studies/cifar10-16px.toml from CIFAR-10: four classes, 16 pixels, by averaging 2x2 blocks.

    python studies/cifar10_16px.py FOLDER_OF_CIFAR10_PARQUET

writes data/cifar10-16px/{real-2000,real-500,oracle-8000,test}.npz: disjoint, class-balanced, in a fixed random order.
"oracle" are real images that play the part of synthetic ones: a generator without any error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puma.data.load import load_dataset
from puma.data.source import Source

CLASSES = ("airplane", "automobile", "frog", "horse")
OUT = Path("data/cifar10-16px")


def halved(source: Source, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of the four classes at half the size, and labels 0 to 3, in random order."""
    places = [list(source.class_names).index(name) for name in CLASSES]
    labels = np.asarray(source.labels)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(labels, places)))
    images = np.stack([source[int(row)][0] for row in rows]).astype(np.float32)
    small = images.reshape(len(rows), 16, 2, 16, 2, 3).mean(axis=(2, 4))
    return np.round(small).astype(np.uint8), np.searchsorted(np.sort(places), labels[rows])


def write(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], start: int, count: int) -> None:
    """Write ``count`` images, as many of each class, beginning with the ``start``-th."""
    each, first = count // len(CLASSES), start // len(CLASSES)
    rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[first : first + each] for k in range(len(CLASSES))]))
    np.savez(OUT / f"{name}.npz", image=images[rows], label=labels[rows])
    print(f"{name}: {len(rows)} images")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    OUT.mkdir(parents=True, exist_ok=True)
    train = halved(load_dataset([str(path) for path in sorted(folder.glob("train-*.parquet"))]), seed=0)
    write("real-2000", *train, start=0, count=2000)
    write("real-500", *train, start=0, count=500)
    write("oracle-8000", *train, start=2000, count=8000)
    write("test", *halved(load_dataset(str(folder / "test-00000-of-00001.parquet")), seed=1), start=0, count=4000)
