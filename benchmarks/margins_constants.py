"""What each tuned constant of DeepFool does: the table in `puma.attacks`, halved and doubled one by one.

    python benchmarks/margins_constants.py ../shared/data/cifar10            # about ten minutes on one core

Images of CIFAR-10's test set at 16x16, the robust CNN. Printed are the changes of the mean margin and of the passes
(one forward or one backward of an image) in percent against the value in the table, Linf / L2, for correctly classified
images in the modes that use the constant, and for misclassified images (``back``). A mean margin that falls is better.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from robust_cnn import load_robust_cnn
from torch import Tensor, nn

import puma
from puma import attacks
from puma.attacks import deepfool, halfspace, search
from puma.data.pool import read_batch

PLAIN = {"overshoot", "tolerance", "growth", "max_stretch"}
SOLVER = {"newton_steps", "iterations", "centering", "to_the_boundary", "gap", "box_slack"}
STEPS = {"stride", "least_stride", "stride_factors", "secant_factors", "least_gain", "worth_a_step"}


@contextmanager
def constants(**changes: Any) -> Iterator[None]:
    """Run with other values of the table."""
    modules = (search, deepfool, halfspace)
    try:
        for module in modules:
            module.TUNED = replace(attacks.TUNED, **changes)
        yield
    finally:
        for module in modules:
            module.TUNED = attacks.TUNED


def scaled(value: Any, factor: float) -> Any:
    """A constant times a factor; counts by one at least; shares below 1 stay so."""
    if isinstance(value, tuple):
        return tuple(scaled(part, factor) for part in value)
    if isinstance(value, int):
        return max(1, round(value * factor))
    return 1 + (value - 1) * factor if value > 1 else min(value * factor, 1.0 if value >= 0.5 else np.inf)


def outcome(model: nn.Module, images: Tensor, labels: Tensor, mode: str) -> list[tuple[float, float, int]]:
    """Mean distance, passes an image, images without one; in both norms."""
    rows = []
    for norm in puma.threat.NORMS:
        hit = puma.deepfool(model, images, labels, norm=norm, mode=mode)
        found = hit.margin.isfinite()
        rows.append((float(hit.margin[found].abs().mean()), sum(hit.passes) / len(images), int((~found).sum())))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with test-*.parquet")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.cifar10.is_dir():
        print(f"{options.cifar10} is absent: nothing to measure on")
        return
    model, tuned = load_robust_cnn(), attacks.TUNED
    source = puma.load_dataset(f"{options.cifar10}/test-*.parquet?resize=16&subset={options.images}")
    images, labels = read_batch(source, np.arange(len(source)))
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    ahead, back = (images[right], labels[right]), (images[~right], labels[~right])
    base: dict[tuple[str, str], Any] = {}
    for field in fields(tuned):
        if field.name == "gradients" or (options.only and field.name not in options.only):
            continue
        value = getattr(tuned, field.name)
        cases = [("deepfool", "ahead")] if field.name in PLAIN else []
        cases += [("tight", "ahead")] if field.name in STEPS else [("refined", "ahead")]
        cases += [("refined", "back")] if field.name in STEPS | PLAIN | SOLVER | {"ray_overshoot"} else []
        for mode, kind in cases:
            batch = ahead if kind == "ahead" else back
            if (mode, kind) not in base:
                base[mode, kind] = outcome(model, *batch, mode)
            cells = []
            for factor in (0.5, 2.0):
                with constants(**{field.name: scaled(value, factor)}):
                    changed = outcome(model, *batch, mode)
                pairs = list(zip(changed, base[mode, kind], strict=True))
                margins = "/".join(f"{100 * (new[0] / old[0] - 1):+.1f}" for new, old in pairs)
                passes = "/".join(f"{100 * (new[1] / old[1] - 1):+.0f}" for new, old in pairs)
                lost = "/".join(f"{new[2] - old[2]:+d}" for new, old in pairs)
                cells.append(f"{scaled(value, factor)!s:>16}: {margins} % margin, {passes} % passes, {lost} lost")
            print(f"{field.name:16} {value!s:>16} {mode:8} {kind:5}  " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
