"""Quality and cost of generated digits, and a picture of them: the figures of docs/generation.md.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --out build/generation

Trains the diffusion model of the demo, samples 10,000 images, measures them against the real test split, and writes
``generation.json`` and ``generation.png`` (synthetic images over the real training images nearest to them, and real
test images over theirs). Times are CPU seconds of this process, which other work on the machine stretches less than
the clock.

    OMP_NUM_THREADS=1 python benchmarks/generation.py --cost [--tflops 100 250]

measures one training step and one evaluation of the UNet on this CPU instead, counts their operations, and says on
paper what the settings for 32 pixels take where so many TFLOP/s are sustained.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from puma.data.load import load_dataset
from puma.data.source import Source
from puma.generation import Diffusion, SamplerConfig, diffusion_config, generate_from, measure
from puma.generation.diffusion import build_denoiser, train_diffusion
from puma.generation.edm import loss
from puma.generation.networks import AUGMENT_DIM
from puma.io import write_json

PER_CLASS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/generation"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="cost of the UNet for 32 pixels, and nothing else")
    parser.add_argument("--tflops", type=float, nargs="+", default=[100.0, 250.0], help="of a GPU in bf16, on paper")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cost:
        print(json.dumps(cost(options.tflops), indent=2))
        return
    train, test = load_dataset("digits:train"), load_dataset("digits:test")
    folder = options.out / f"seed-{options.seed}"
    started = time.process_time()
    model = train_diffusion(
        train, folder / "model", config=diffusion_config(train.image_shape), seed=options.seed, progress=True
    )
    trained = time.process_time()
    path = folder / "synthetic.npz"
    generate_from(model, options.count, out=path, seed=options.seed, progress=True)
    sampled = time.process_time()
    synthetic = load_dataset(path)
    quality = measure(train, test, synthetic)
    result = {
        "cpu_seconds": {"training": trained - started, "sampling": sampled - trained},
        "images_per_cpu_second": options.count / (sampled - trained),
        "parameters": _parameters(model),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "quality": quality,
    }
    write_json(folder / "generation.json", result)
    _draw(folder / "generation.png", train, test, synthetic)
    print(json.dumps({name: result[name] for name in ("cpu_seconds", "images_per_cpu_second", "parameters")}, indent=2))
    print(json.dumps({name: quality[name] for name in quality if name not in ("sources",)}, indent=2))


def cost(tflops: list[float], batch: int = 16, turns: int = 5) -> dict[str, object]:
    """Images per CPU second of the UNet for 32 pixels, and what it takes on paper elsewhere."""
    config, sampler = diffusion_config((32, 32, 3)), SamplerConfig()
    denoiser = build_denoiser(config, (32, 32, 3), 10)
    images, labels, sigma = torch.rand(batch, 3, 32, 32) * 2 - 1, torch.arange(batch) % 10, torch.full((batch,), 0.5)
    noise, applied = torch.randn_like(images), torch.zeros(batch, AUGMENT_DIM)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        denoiser(images, sigma, labels, applied)
    with FlopCounterMode(display=False) as step:
        loss(denoiser, images, labels, sigma, noise, applied).mean().backward()
    seconds: dict[str, list[float]] = {}
    for _ in range(turns):
        for precision in ("fp32", "bf16"):
            denoiser.bf16 = precision == "bf16"
            began = time.process_time()
            loss(denoiser.train(), images, labels, sigma, noise, applied).mean().backward()
            seconds.setdefault(f"training, {precision}", []).append(time.process_time() - began)
            began = time.process_time()
            with torch.inference_mode():
                denoiser.eval()(images, sigma, labels)
            seconds.setdefault(f"evaluation, {precision}", []).append(time.process_time() - began)
    evaluations = 2 * sampler.steps - 1  # Heun
    trained = step.get_total_flops() / batch * config.batch_size * config.steps
    sampling = forward.get_total_flops() / batch * evaluations
    return {
        "images_per_cpu_second": {kind: batch / statistics.median(values) for kind, values in seconds.items()},
        "sampled_per_cpu_second": batch / statistics.median(seconds["evaluation, bf16"]) / evaluations,
        "gflop_per_image": {"evaluation": forward.get_total_flops() / batch / 1e9, "sampling": sampling / 1e9},
        "training_pflop": trained / 1e15,
        "on_paper": {
            f"{rate:g} TFLOP/s": {
                "training_minutes": trained / rate / 1e12 / 60,
                "sampled_per_second": rate * 1e12 / sampling,
            }
            for rate in tflops
        },
        "torch": torch.__version__,
    }


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


def _show(axis: Axes, image: NDArray[np.uint8]) -> None:
    axis.imshow(image[:, :, 0], cmap="gray_r", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])


if __name__ == "__main__":
    main()
