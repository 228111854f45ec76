"""Make the images of studies/cifar10-16px.toml from CIFAR-10: four classes, 16 pixels, by averaging 2x2 blocks.

    python studies/cifar10_16px.py FOLDER_OF_CIFAR10_PARQUET [--size 32]

writes data/cifar10-16px/{real-2000,real-500,oracle-8000,test}.npz: class-balanced, in a fixed random order; oracle and
real are disjoint. With ``--size 32`` it is all ten classes as they are, for studies/cifar10-32px-gpu.toml:
data/cifar10-32px/{real-10000,oracle-40000,test}.npz.
"oracle" are real images that play the part of synthetic ones: a generator without any error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puma.data.load import load_dataset
from puma.data.source import Source

CLASSES = ("airplane", "automobile", "frog", "horse")


def shrunk(
    source: Source, seed: int, classes: tuple[str, ...], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of ``classes`` at ``size`` pixels, and labels from 0 on, in random order."""
    places = [list(source.class_names).index(name) for name in classes]
    labels, block = np.asarray(source.labels), 32 // size
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(labels, places)))
    images = np.stack([source[int(row)][0] for row in rows])
    if block > 1:
        blocks = images.astype(np.float32).reshape(len(rows), size, block, size, block, 3)
        images = np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)
    return images, np.searchsorted(np.sort(places), labels[rows])


def write(path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], start: int, count: int) -> None:
    """Write ``count`` images, as many of each class, beginning with the ``start``-th."""
    classes = int(labels.max()) + 1
    each, first = count // classes, start // classes
    rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[first : first + each] for k in range(classes)]))
    np.savez(unfinished := path.with_suffix(".tmp.npz"), image=images[rows], label=labels[rows])
    unfinished.replace(path)
    print(f"{path}: {len(rows)} images")


def main() -> None:
    """Write the files of one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--size", type=int, choices=(16, 32), default=16, help="pixels")
    options = parser.parse_args()
    size, out = options.size, Path(f"data/cifar10-{options.size}px")
    out.mkdir(parents=True, exist_ok=True)
    source = load_dataset([str(path) for path in sorted(options.cifar10.glob("train-*.parquet"))])
    classes = CLASSES if size == 16 else tuple(source.class_names)
    train = shrunk(source, 0, classes, size)
    parts = (
        {"real-2000": 0, "real-500": 0, "oracle-8000": 2000}
        if size == 16
        else {"real-10000": 0, "oracle-40000": 10_000}
    )
    for name, start in parts.items():
        write(out / f"{name}.npz", *train, start=start, count=int(name.rpartition("-")[2]))
    test = load_dataset(str(options.cifar10 / "test-00000-of-00001.parquet"))
    write(out / "test.npz", *shrunk(test, 1, classes, size), start=0, count=1000 * len(classes))


if __name__ == "__main__":
    main()
