"""Budgets and constants of the margin engine on five networks: what tightens the tails, and what that costs.

    python benchmarks/margins_networks.py ../shared/data/cifar10        # the networks that are not committed
    python benchmarks/margins_tuning.py ../shared/data/cifar10          # about three minutes on one core
    python benchmarks/margins_tuning.py ../shared/data/cifar10 --store  # and keep it in margins_tuning.json

Each setting is one change to `BUDGETS` or `TUNED`. Quality is the ratio of margins to those of adv-lib's DeepFool (50
steps, all classes) of the same correctly classified test images: the ratio of the means, and the 99th percentile of the
images' own ratios. Cost is passes an image, and CPU time with the settings taking turns chunk by chunk. Settings are
chosen by `TUNED_ON`; `HELD_OUT` says whether the choice holds elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from margins import correct_images, length, processor
from margins_constants import constants
from margins_networks import HELD_OUT, TUNED_ON, load_network

import puma
from puma.attacks.deepfool import BUDGETS, Mode, SearchBudget

STORED = Path(__file__).with_name("margins_tuning.json")
CHUNK, SEED = 64, 21
SETTINGS: dict[Mode, dict[str, dict[str, Any]]] = {
    "deepfool": {
        "as it is": {},
        "2 candidates": {"candidates": 2},
        "3 candidates": {"candidates": 3},
        "5 candidates": {"candidates": 5},
        "9 candidates": {"candidates": 9},
        "overshoot 0.01": {"overshoot": 0.01},
    },
    "refined": {
        "as it is": {},
        "3 candidates": {"candidates": 3},
        "4 rotations": {"rotations": (0.7, 0.4, 0.3, 0.25)},
        "2 boundary steps": {"boundary_steps": 2},
        "overshoot 0.01, ray overshoot 0.05": {"overshoot": 0.01, "ray_overshoot": 0.05},
    },
}


@contextmanager
def changed(mode: Mode, changes: dict[str, Any]) -> Iterator[None]:
    """Run with other values of the mode's budget and of the table of constants."""
    budget, own = BUDGETS[mode], {field.name for field in fields(SearchBudget)}
    BUDGETS[mode] = replace(budget, **{name: value for name, value in changes.items() if name in own})
    try:
        with constants(**{name: value for name, value in changes.items() if name not in own}):
            yield
    finally:
        BUDGETS[mode] = budget


def measure(name: str, folder: Path, count: int, norm: str, only: list[str]) -> dict[str, Any]:
    """Every setting on one network in one norm."""
    model = load_network(name)
    images, labels = correct_images(model, folder, 16, count, SEED)
    attack = peers.adv_lib_deepfool(norm)
    cases = [(mode, text, change) for mode, settings in SETTINGS.items() for text, change in settings.items()]
    cases = [case for case in cases if not only or case[1] in only or not case[2]]
    for mode, _, change in cases:  # warm up allocators and kernels
        with changed(mode, change):
            puma.deepfool(model, images[:8], labels[:8], norm=norm, mode=mode)
    attack(model, images[:8], labels[:8])
    seconds, passes = np.zeros(len(cases)), np.zeros((len(cases), 2))
    margins: list[list[torch.Tensor]] = [[] for _ in cases]
    reference, spent = [], 0.0
    for start in range(0, len(images), CHUNK):
        x, y = images[start : start + CHUNK], labels[start : start + CHUNK]
        began = time.process_time()
        reference.append(length(attack(model, x, y) - x, norm))
        spent += time.process_time() - began
        for row in np.roll(np.arange(len(cases)), start // CHUNK):  # the first pays for what the peer left in caches
            mode, _, change = cases[row]
            with changed(mode, change):
                began = time.process_time()
                hit = puma.deepfool(model, x, y, norm=norm, mode=mode)
                seconds[row] += time.process_time() - began
            passes[row] += hit.passes
            margins[row].append(hit.margin)
    theirs = torch.cat(reference)
    table: dict[str, Any] = {"images": len(images), "adv-lib ms": round(1e3 * spent / len(images), 3)}
    for row, (mode, text, _) in enumerate(cases):
        ours = torch.cat(margins[row])
        both = ours.isfinite() & (theirs > 0)
        ratio = ours[both] / theirs[both]
        table[f"{mode}: {text}"] = {
            "mean": round(float(ours[both].sum() / theirs[both].sum()), 4),
            "median": round(float(ratio.median()), 4),
            "p99": round(float(ratio.quantile(0.99)), 4),
            "forwards": round(passes[row, 0] / len(images), 3),
            "backwards": round(passes[row, 1] / len(images), 3),
            "ms": round(1e3 * seconds[row] / len(images), 3),
            "uncrossed": int((~ours.isfinite()).sum()),
        }
    return table


def show(title: str, table: dict[str, Any]) -> None:
    print(f"\n{title}: {table['images']} images; adv-lib {table['adv-lib ms']:.2f} ms")
    for name, row in table.items():
        if isinstance(row, dict):
            quality = f"mean {row['mean']:.4f}  median {row['median']:.4f}  p99 {row['p99']:.3f}"
            cost = (
                f"{row['forwards']:6.2f} f {row['backwards']:6.2f} b {row['ms']:7.2f} ms  {row['uncrossed']} uncrossed"
            )
            print(f"  {name:40} {quality}  {cost}", flush=True)


def store(case: str, table: dict[str, Any]) -> None:
    """Put one network and norm into the JSON file, a line for each setting."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    versions = {"torch": torch.__version__, "adv-lib": peers.versions()["adv-lib"], "machine": processor()}
    stored = {**stored, "environment": {**versions, "seed": SEED, "chunk": CHUNK, "threads": 1}, case: table}
    blocks = (
        ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()) for rows in stored.values()
    )
    cases = (f" {json.dumps(name)}: {{\n{block}\n }}" for name, block in zip(stored, blocks, strict=True))
    STORED.write_text("{\n" + ",\n".join(cases) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with test-*.parquet")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--networks", nargs="*", default=[*TUNED_ON, HELD_OUT])
    parser.add_argument("--only", nargs="*", default=[], help="names of settings, beside the present one")
    parser.add_argument("--store", action="store_true", help="write what was measured into the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.cifar10.is_dir():
        sys.exit(f"{options.cifar10} is absent: nothing to measure on")
    for name in options.networks:
        for norm in puma.threat.NORMS:
            table = measure(name, options.cifar10, options.images, norm, options.only)
            show(f"{name}{' (held out)' if name == HELD_OUT else ''}, {norm}", table)
            if options.store:
                store(f"{name}, {norm}", table)


if __name__ == "__main__":
    main()
