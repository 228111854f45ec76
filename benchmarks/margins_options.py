"""What folding, bfloat16 gradients and ``torch.compile`` do to the margin engine here: speed, margins, shapes.

    python benchmarks/margins_options.py ../shared/data/cifar10           # about two minutes on one core

One thread, CPU time, variants in turn, on the robust CNN and on correctly classified images. "not folded" searches with
the model as it is, its batch normalisation apart. Compiling is left out of the speeds and printed by itself.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from margins import correct_images, processor
from robust_cnn import load_robust_cnn
from torch import nn
from torch._dynamo.utils import counters

import puma

CHUNK = 64


def unfolded(model: nn.Module, *_: object) -> nn.Module:
    """In place of `fold_batchnorm`: the model as it is."""
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with test-*.parquet")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--mode", default="refined")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.cifar10.is_dir():
        print(f"{options.cifar10} is absent: nothing to measure on")
        return
    model = load_robust_cnn()
    images, labels = correct_images(model, options.cifar10, 16, options.images, 11)
    proxy = torch.compile(model, dynamic=False)
    variants = {
        "float32": {},
        "not folded": {},
        "bf16 gradients": {"precision": "bf16"},
        "compiled": {"proxy": proxy},
    }
    began = time.perf_counter()
    for variant in variants.values():  # every size a shrinking chunk is filled up to
        for count in (CHUNK, CHUNK // 2, CHUNK // 4, CHUNK // 8):
            puma.deepfool(model, images[:count], labels[:count], mode=options.mode, chunk=CHUNK, **variant)
    print(f"compiled {counters['stats']['unique_graphs']} graphs, {time.perf_counter() - began:.0f} s with the warm-up")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    margins: dict[str, torch.Tensor] = {}
    for _ in range(5):
        for name, variant in variants.items():
            before = time.process_time()
            with patch("puma.attacks.network.fold_batchnorm", unfolded) if name == "not folded" else nullcontext():
                hit = puma.deepfool(model, images, labels, mode=options.mode, chunk=CHUNK, **variant)
            seconds[name].append((time.process_time() - before) / len(images))
            margins[name] = hit.margin
    plain = margins["float32"]
    print(f"{processor()}, one thread, torch {torch.__version__}, Linf, mode {options.mode}, {len(images)} images")
    for name in variants:
        ratio = margins[name] / plain
        quick, base = np.median(seconds[name]), np.median(seconds["float32"])
        print(
            f"{name:16} {1 / quick:8.0f} images/s {base / quick:6.2f} x float32; margins / float32's: "
            f"1 % below {ratio.nanquantile(0.01):.3f}, median {ratio.nanmedian():.4f}, mean {ratio.nanmean():.4f}, "
            f"1 % above {ratio.nanquantile(0.99):.3f}; uncrossed {int(ratio.isnan().sum())}"
        )
    print(f"{counters['stats']['unique_graphs']} graphs in the end")


if __name__ == "__main__":
    main()
