"""Train the small robust CNN on which the margin engine is measured (CIFAR-10 at 16x16, PGD-2 adversarial training).

    python benchmarks/robust_cnn.py ../shared/data/cifar10        # about six minutes on one core

The weights are committed (benchmarks/robust_cnn.safetensors, 0.6 MB), so this need not be run again; it is here so
that nobody has to believe them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import puma
from puma.data.pool import read_batch

WEIGHTS = Path(__file__).with_name("robust_cnn.safetensors")
THREAT = puma.ThreatModel("Linf", 8 / 255)


def robust_cnn() -> nn.Sequential:
    """16x16 RGB, 150,000 weights, BatchNorm, no normalisation outside: pixels in [0, 1] go in as they are."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *block(64, 128, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))


def load_robust_cnn() -> nn.Sequential:
    """The committed model, in eval mode."""
    model = robust_cnn()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of them and shift all by up to two pixels."""
    flipped = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
    padded = nn.functional.pad(flipped, (2, 2, 2, 2))
    down, right = (int(v) for v in torch.randint(0, 5, (2,), generator=generator))
    return padded[:, :, down : down + 16, right : right + 16]


def train(
    images: Tensor,
    labels: Tensor,
    steps: int,
    seed: int,
    model: nn.Module | None = None,
    attack_steps: int = 2,
    rate: float = 0.2,
) -> nn.Module:
    """Adversarial training at 8/255 (PGD; 0 attack steps: standard training), SGD, one cosine cycle up to ``rate``."""
    torch.manual_seed(seed)
    model = (robust_cnn() if model is None else model).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    began = time.process_time()
    for step in range(steps):
        rows = torch.randint(0, len(images), (128,), generator=generator)
        batch = _augment(images[rows], generator).contiguous(memory_format=torch.channels_last)
        if attack_steps:
            model.eval()
            settings = {"threat": THREAT, "steps": attack_steps, "step_size": 6 / 255, "generator": generator}
            batch = puma.pgd(model, batch, labels[rows], **settings)
        model.train()
        loss = cross_entropy(model(batch), labels[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.process_time() - began:.0f} s CPU", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.cifar10.is_dir():
        sys.exit(f"{options.cifar10} is absent: nothing to train on")
    source = puma.load_dataset(f"{options.cifar10}/train-*.parquet?resize=16")
    images, labels = read_batch(source, np.arange(len(source)))
    model = train(images, labels, options.steps, options.seed)
    test = puma.load_dataset(f"{options.cifar10}/test-*.parquet?resize=16")
    held_out, truth = read_batch(test, np.arange(2000))
    with torch.no_grad():
        clean = (model(held_out).argmax(1) == truth).float().mean().item()
    attacked = puma.pgd(model, held_out, truth, threat=THREAT, steps=20)
    with torch.no_grad():
        robust = (model(attacked).argmax(1) == truth).float().mean().item()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, WEIGHTS)
    print(f"clean {clean:.3f}, PGD-20 {robust:.3f} on the first 2,000 test images; wrote {WEIGHTS.name}")


if __name__ == "__main__":
    main()
