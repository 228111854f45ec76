"""What ``refine_below`` saves, and how far its plan is from the plan of a full search.

    python benchmarks/margins_refine.py ../shared/data/cifar10           # half a minute on one core
    python benchmarks/margins_refine.py ../shared/data/cifar10 --store   # and keep it with the baseline

The pool is images of CIFAR-10's test set at 16x16, the margin model the robust CNN, which is wrong about half of them.
The plan that ``mode="fast"`` alone would give stands beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from margins import BASELINE, processor
from robust_cnn import load_robust_cnn

import puma
from puma.margins import Status

PRUNE = 0.3


def timed(work: Callable[[], puma.MarginTable]) -> tuple[puma.MarginTable, float]:
    """A table and the CPU seconds it took."""
    began = time.process_time()
    return work(), time.process_time() - began


def against(table: puma.MarginTable, full: puma.MarginTable, threat: puma.ThreatModel) -> dict[str, float]:
    """How the plans of two tables differ."""
    plan, exact = (puma.make_plan(t, "puma", PRUNE, threat=threat) for t in (table, full))
    both = plan.keep & exact.keep
    apart = np.abs(plan.eps[both] - exact.eps[both]) / threat.eps
    return {
        "rows_kept_otherwise": int((plan.keep != exact.keep).sum()),
        "share_kept_otherwise": float((plan.keep != exact.keep).mean()),
        "eps_apart_by_5_percent": float((apart > 0.05).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with test-*.parquet")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--eps", type=float, nargs="*", default=[8, 2], help="in 1/255")
    parser.add_argument("--store", action="store_true", help="write it into the baseline")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.cifar10.is_dir():
        print(f"{options.cifar10} is absent: nothing to measure on")
        return
    pool = puma.Pool([puma.load_dataset(f"{options.cifar10}/test-*.parquet?resize=16&subset={options.images}")])
    model = load_robust_cnn()
    full, full_s = timed(lambda: puma.score_margins(model, pool))
    fast, fast_s = timed(lambda: puma.score_margins(model, pool, mode="fast"))
    wrong = float((full.status == Status.MISCLASSIFIED).mean())
    print(f"{processor()}, one thread, torch {torch.__version__}: {len(pool):,} images, {wrong:.1%} misclassified")
    print(f"refined {full_s:.1f} s CPU, fast {fast_s:.1f} s")
    record: dict[str, Any] = {"images": len(pool), "misclassified": wrong, "refined_s": full_s, "fast_s": fast_s}
    for eps in options.eps:
        threat = puma.ThreatModel("Linf", eps / 255)
        table, seconds = timed(lambda limit=2 * threat.eps: puma.score_margins(model, pool, refine_below=limit))
        result: dict[str, Any] = {"seconds": seconds, "searched": int((table.status != Status.ESTIMATED).sum())}
        result |= against(table, full, threat)
        record[f"eps {eps:g}/255"] = result | {"fast alone": against(fast, full, threat)}
        print(f"eps {eps:g}/255, prune {PRUNE}: {json.dumps(record[f'eps {eps:g}/255'], indent=1)}")
    if options.store:
        stored = json.loads(BASELINE.read_text())
        stored["refine_below"] = record
        BASELINE.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
