"""Quality and cost of generated digits, and a picture of them: the figures of docs/generation.md.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --out build/generation

Trains the diffusion model of the demo, draws 10,000 images, judges them against the real test split, and writes
``generation.json`` and ``generation.png`` (synthetic images over the real training images nearest to them, and real
test images over theirs). Times are CPU seconds of this process, which other work on the machine stretches less than
the clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

from puma.data.load import load_dataset
from puma.data.source import Source
from puma.files import write_json
from puma.generation import Diffusion, SamplerConfig, generate_from
from puma.generation.config import preset
from puma.generation.quality import measure
from puma.generation.training import train_diffusion

PER_CLASS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/generation"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test = load_dataset("digits:train"), load_dataset("digits:test")
    folder = options.out / f"seed-{options.seed}"
    started = time.process_time()
    model = train_diffusion(train, folder / "model", config=preset("digits"), seed=options.seed, progress=True)
    trained = time.process_time()
    path = folder / "synthetic.npz"
    generate_from(model, options.count, out=path, sampler=SamplerConfig(), seed=options.seed, progress=True)
    drawn = time.process_time()
    synthetic = load_dataset(path)
    quality = measure(train, test, synthetic)
    told = {
        "cpu_seconds": {"training": trained - started, "drawing": drawn - trained},
        "images_per_cpu_second": options.count / (drawn - trained),
        "parameters": _parameters(model),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "quality": quality,
    }
    write_json(folder / "generation.json", told)
    _draw(folder / "generation.png", train, test, synthetic)
    print(json.dumps({name: told[name] for name in ("cpu_seconds", "images_per_cpu_second", "parameters")}, indent=2))
    print(json.dumps({name: quality[name] for name in quality if name not in ("sources",)}, indent=2))


def _parameters(model: Diffusion) -> int:
    return sum(weight.numel() for weight in model.denoiser.parameters())


def _draw(target: Path, train: Source, test: Source, synthetic: Source) -> None:
    """Two blocks of two rows: generated over nearest real, unseen real over nearest real."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    known = train.read(slice(None))
    figure, axes = plt.subplots(4, 10 * PER_CLASS, figsize=(10 * PER_CLASS * 0.5, 2.9))
    names = ["synthetic", "nearest real\n(training)", "real test", "nearest real\n(training)"]
    for block, source in enumerate((synthetic, test)):
        rows = np.concatenate([np.flatnonzero(source.labels == label)[:PER_CLASS] for label in range(10)])
        images = source.read(rows)
        for column, image in enumerate(images):
            gap = ((known.astype(float) - image) ** 2).sum((1, 2, 3))
            for row, shown in ((2 * block, image), (2 * block + 1, known[int(gap.argmin())])):
                _show(axes[row, column], shown)
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=0.1, right=0.995, top=0.99, bottom=0.01, wspace=0.08, hspace=0.08)
    figure.savefig(target, dpi=110, metadata={"Software": None})


def _show(axis: plt.Axes, image: NDArray[np.uint8]) -> None:  # type: ignore[name-defined]  # noqa: F821
    axis.imshow(image[:, :, 0], cmap="gray_r", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])


if __name__ == "__main__":
    main()
