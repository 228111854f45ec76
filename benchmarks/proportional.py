"""PGD steps in proportion to each image's radius: what it saves, and whether the trained network is another one.

    OMP_NUM_THREADS=1 python benchmarks/proportional.py [--seeds N] [--images N] [--out FILE]

Digits, the packaged recipe: a margin model trained on everything scores the training images, the strategies `puma` and
`puma-plus` plan them, and every plan is trained with both schedules from the same seeds. Both networks of a pair are
judged on the same test images, clean and by APGD-CE, AutoAttack's first attack. What is compared is the difference
within a pair, proportional less fixed, with Student's t over the seeds.

A training's time is the CPU time of its process, the two schedules of a pair one after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import puma
from puma.tradeoff import mean_interval
from puma.training.recipe import Recipe, load_recipe

THREAT = puma.ThreatModel("Linf", 0.2)
PRUNE_FRACTION = 0.3
STRATEGIES = ("puma", "puma-plus")
SCHEDULES = ("fixed", "proportional")


def forward_equivalents(recipe: Recipe, attack_cost: float) -> float:
    """Work of one step in forward passes of its batch: clean and perturbed (forward, backward), and the attack."""
    return 2 * 3 + attack_cost * recipe.attack_steps * 2


def one_training(
    pool: puma.Pool, plan: puma.Plan, schedule: str, seed: int, images: int, clip: float | None
) -> dict[str, float]:
    recipe = load_recipe("digits", attack_schedule=schedule, clip_gradient=clip)
    began = time.process_time()
    run = puma.train("small-cnn", pool, threat=THREAT, plan=plan, recipe=recipe, seed=seed)
    seconds = time.process_time() - began
    result = puma.evaluate(run.model, puma.load_dataset("digits:test"), THREAT, attack="apgd-ce", subset=images)
    return {
        "seconds_per_step": seconds / recipe.steps,
        "attack_cost": run.meta["attack_cost"],
        "forward_equivalents": forward_equivalents(recipe, run.meta["attack_cost"]),
        "clean_accuracy": result.clean_accuracy,
        "apgd_accuracy": float(result.apgd_accuracy or 0.0),
    }


def compare(
    strategy: str, pool: puma.Pool, table: puma.MarginTable, seeds: int, images: int, clip: float | None
) -> dict[str, object]:
    plan = puma.make_plan(table, strategy=strategy, prune_fraction=PRUNE_FRACTION, threat=THREAT)
    rows = [
        {"seed": seed, "schedule": schedule, **one_training(pool, plan, schedule, seed, images, clip)}
        for seed in range(seeds)
        for schedule in SCHEDULES
    ]
    by = {s: [row for row in rows if row["schedule"] == s] for s in SCHEDULES}

    def median(schedule: str, name: str) -> float:
        return statistics.median(float(row[name]) for row in by[schedule])

    differences = {}
    for name in ("clean_accuracy", "apgd_accuracy"):
        pairs = [float(b[name]) - float(a[name]) for a, b in zip(by["fixed"], by["proportional"], strict=True)]
        found = mean_interval(pairs)
        differences[name] = {"pairs": pairs, "mean": found.value, "low": found.low, "high": found.high}
    return {
        "strategy": strategy,
        "kept": int(plan.keep.sum()),
        "mean_eps_share": float(np.mean(plan.eps[plan.keep])) / THREAT.eps,
        "median": {s: {n: median(s, n) for n in ("forward_equivalents", "seconds_per_step")} for s in SCHEDULES},
        "differences": differences,
        "trainings": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=899, help="Test images that are attacked.")
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES)
    parser.add_argument("--clip-gradient", type=float, help="Clip gradients at this norm; the recipe does not.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pool = puma.Pool([puma.load_dataset("digits:train")])
    scorer = puma.train("small-cnn", pool, threat=THREAT, recipe="digits", seed=1000).model
    table = puma.score_margins(scorer, pool, norm="Linf")
    report = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "threat": str(THREAT),
        "prune_fraction": PRUNE_FRACTION,
        "seeds": options.seeds,
        "images": options.images,
        "clip_gradient": options.clip_gradient,
        "strategies": [
            compare(strategy, pool, table, options.seeds, options.images, options.clip_gradient)
            for strategy in options.strategies
        ],
    }
    for row in report["strategies"]:
        print(f"{row['strategy']}: {row['kept']} images, mean eps {row['mean_eps_share']:.2f} of the full one")
        for name, ratio in (
            ("forward_equivalents", "forward passes a step"),
            ("seconds_per_step", "CPU seconds a step"),
        ):
            fixed, proportional = (row["median"][schedule][name] for schedule in SCHEDULES)
            print(f"  {ratio:22} {fixed:.4g} -> {proportional:.4g}  ({1 - proportional / fixed:.0%} less)")
        for name, difference in row["differences"].items():
            low, high = difference["low"], difference["high"]
            print(f"  {name:22} {difference['mean']:+.2%}  (95 % interval {low:+.2%} to {high:+.2%})")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
