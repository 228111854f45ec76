"""Networks of other kinds than the robust CNN, to tune the margin engine on and to check it: CIFAR-10 at 16x16.

    python benchmarks/margins_networks.py ../shared/data/cifar10     # trains what is missing: four minutes of one core

Weights go to ``data/margin-networks`` (not committed: the same command makes them again).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from robust_cnn import load_robust_cnn, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import puma
from puma.data.pool import read_batch

FOLDER = Path("data/margin-networks")


class Transformer(nn.Module):
    """A vision transformer (arXiv 2010.11929) on patches of 4x4: attention, LayerNorm, GELU; no convolution inside."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.logits = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of images ``[B, 3, 16, 16]``."""
        tokens = self.patches((images - 0.47) / 0.25).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.logits(self.layers(tokens).mean(1))
        return logits


class Kind(NamedTuple):
    """How a network is built and trained."""

    build: Callable[[], nn.Module]
    steps: int
    robust: bool
    rate: float


def small_cnn(norm: str, widths: tuple[int, int, int], seed: int) -> nn.Module:
    return puma.build_model("small-cnn", 10, image_size=16, norm=norm, widths=widths, seed=seed)


KINDS = {
    "standard CNN without norm": Kind(lambda: small_cnn("none", (32, 64, 64), 1), 1000, robust=False, rate=0.05),
    "standard transformer": Kind(Transformer, 1200, robust=False, rate=0.05),
    "robust CNN with GroupNorm": Kind(lambda: small_cnn("group", (32, 64, 64), 1), 800, robust=True, rate=0.1),
    "robust SiLU CNN": Kind(lambda: small_cnn("batch", (24, 48, 48), 2), 1000, robust=True, rate=0.2),
}
TUNED_ON = ("robust CNN", *list(KINDS)[:3])
HELD_OUT = list(KINDS)[3]


def load_network(name: str) -> nn.Module:
    """A network in eval mode: ``"robust CNN"`` (committed) or one of `KINDS`, trained before."""
    if name == "robust CNN":
        return load_robust_cnn()
    path = FOLDER / f"{name.replace(' ', '-')}.safetensors"
    if not path.exists():
        sys.exit(f"{path} is absent: python benchmarks/margins_networks.py trains it")
    model = KINDS[name].build()
    model.load_state_dict(load_file(path))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with train-*.parquet")
    parser.add_argument("--only", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.cifar10.is_dir():
        sys.exit(f"{options.cifar10} is absent: nothing to train on")
    source = puma.load_dataset(f"{options.cifar10}/train-*.parquet?resize=16")
    images, labels = read_batch(source, np.arange(len(source)))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed, (name, kind) in enumerate(KINDS.items(), 100):
        path = FOLDER / f"{name.replace(' ', '-')}.safetensors"
        if name not in options.only or path.exists():
            continue
        torch.manual_seed(seed)
        began = time.process_time()
        model = train(images, labels, kind.steps, seed, kind.build(), attack_steps=2 * kind.robust, rate=kind.rate)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        print(f"{name}: {time.process_time() - began:.0f} s CPU", flush=True)


if __name__ == "__main__":
    main()
