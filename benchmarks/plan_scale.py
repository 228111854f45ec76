"""Fifty million margins through `make_plan`: seconds and memory.

    python benchmarks/plan_scale.py                       # the target: 90 s and 8 GB on 2 cores
    python benchmarks/plan_scale.py --rows 1000000        # a quick look

The table is synthetic: ten classes, one million real rows, the rest generated. It is held in memory, or with
``--folder`` written as parts and read back, which is then timed too.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from pathlib import Path

import numpy as np

from puma.margins import MarginTable, Status
from puma.strategies import make_plan
from puma.threat import ThreatModel


def synthetic_table(rows: int, seed: int) -> MarginTable:
    """A table of ``rows`` rows, 8 % of them misclassified."""
    generator = np.random.default_rng(seed)
    real = min(1_000_000, rows // 5)
    margin = generator.gamma(2.0, 0.02, rows).astype(np.float32)
    wrong = generator.random(rows, dtype=np.float32) < 0.08
    np.negative(margin, out=margin, where=wrong)
    label = generator.integers(0, 10, rows, dtype=np.int16)
    counts = {"real": real, "synthetic": rows - real}
    sources = [{"name": role, "role": role, "rows": count} for role, count in counts.items()]
    return MarginTable(
        label=label,
        predicted=np.where(wrong, (label + 1) % 10, label).astype(np.int16),
        margin=margin,
        status=np.where(wrong, np.int8(Status.MISCLASSIFIED), np.int8(Status.CROSSED)),
        steps=np.full(rows, 3, np.int16),
        source=(np.arange(rows) >= real).astype(np.int16),
        meta={
            "norm": "Linf",
            "mode": "refined",
            "settings": {"seed": seed, "part_rows": 65_536},
            "model": {"name": "none", "sha256": "0" * 64},
            "pool": {"fingerprint": f"synthetic-{rows}-{seed}", "num_classes": 10, "sources": sources},
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000_000)
    parser.add_argument("--folder", type=Path, help="write parts there and read them back")
    parser.add_argument("--prune-fraction", type=float, default=0.3)
    options = parser.parse_args()
    table = synthetic_table(options.rows, 0)
    marks = [("start", time.perf_counter(), time.process_time())]
    if options.folder:
        table.write(options.folder)
        marks.append(("write parts", time.perf_counter(), time.process_time()))
        del table
        table = MarginTable.read(options.folder)
        marks.append(("read parts", time.perf_counter(), time.process_time()))
    plan = make_plan(table, "puma", options.prune_fraction, threat=ThreatModel("Linf", 8 / 255), class_balanced=True)
    marks.append(("make_plan", time.perf_counter(), time.process_time()))
    for (_, wall, cpu), (name, later, more) in itertools.pairwise(marks):
        print(f"{name:12} {later - wall:8.1f} s wall {more - cpu:8.1f} s CPU")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{options.rows:,} rows, {plan.kept:,} kept; peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
