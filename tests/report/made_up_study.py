"""A small study whose figures are made up by a formula: test data, not a result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.margins import MarginTable, Status
from puma.plan import Plan
from puma.tradeoff import Flags, read_runs
from puma.tradeoff.results import write_flags

EPS = 0.2
REAL, SYNTHETIC, N_CLEAN, N_TEST = 898, 600, 899, 400
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("study", "pool", "strategy", "params")]
    + [("prune_fraction", pa.float64()), ("seed", pa.int64()), ("recipe", pa.string()), ("checkpoint", pa.string())]
    + [
        (name, pa.float64())
        for name in ("eps_train", "clean_accuracy", "robust_accuracy", "apgd_accuracy", "pgd_accuracy")
    ]
    + [("n_test", pa.int64()), ("n_pgd", pa.int64()), ("kept", pa.int64()), ("mean_eps", pa.float64())]
    + [("attack_cost", pa.float64()), ("steps", pa.int64())]
)
# clean and robust accuracy each arm would have without noise
POOL = f"digits:train ({REAL}) + images ({SYNTHETIC})"
ARMS = {
    ("none", "{}", 0.0): (0.960, 0.560),
    ("random", "{}", 0.6): (0.957, 0.550),
    ("difficult", "{}", 0.6): (0.970, 0.480),
    ("easy", "{}", 0.6): (0.945, 0.575),
    ("puma", "{}", 0.6): (0.972, 0.565),
    ("puma-plus", "{}", 0.6): (0.974, 0.590),
    ("cap-only", "{}", 0.0): (0.973, 0.540),
    ("puma-shuffled", "{}", 0.6): (0.966, 0.545),
    ("easy-matched", "{}", 0.6): (0.962, 0.555),
    **{
        ("uniform-eps", json.dumps({"scale": s}), 0.0): (0.99 - 0.03 * s, 0.36 + 0.22 * s)
        for s in (0.375, 0.5, 0.625, 0.75)
    },
    **{("trades-beta", json.dumps({"beta": w}), 0.0): (0.985 - 0.005 * w, 0.48 + 0.016 * w) for w in (1, 2, 3, 8)},
}


def key_of(strategy: str, params: str, prune: float, seed: int, recipe: str = "digits") -> str:
    """Name of a cell's files."""
    parts = [f"{name}-{value}" for name, value in json.loads(params).items()]
    return "-".join([strategy, *parts, f"p{prune * 100:g}", f"s{seed}", recipe])


def draw_flags(strategy: str, params: str, prune: float, seed: int, lower: float) -> tuple[np.ndarray, np.ndarray]:
    """Which test images a made-up run gets right: clean ``[899]``, robust ``[400]``; images differ in difficulty."""
    clean, robust = ARMS[strategy, params, prune]
    easy = np.random.default_rng(0).random(N_CLEAN)
    score = easy + np.random.default_rng([seed, *key_of(strategy, params, prune, seed).encode()]).normal(
        0, 0.05, N_CLEAN
    )
    return score >= 1 - (clean - lower), score[:N_TEST] >= 1 - (robust - lower)


def write_results(folder: Path, name: str = "made up", seeds: int = 2) -> Path:
    """``results.parquet`` alone."""
    rows = []
    for seed in range(seeds):
        for strategy, params, prune in ARMS:
            for checkpoint, lower in (("last", 0.0), ("best", 0.01)):
                clean, robust = draw_flags(strategy, params, prune, seed, lower)
                scale = json.loads(params).get("scale", 0.7 if strategy.startswith(("puma", "cap", "easy-m")) else 1.0)
                row = {
                    "study": name,
                    "pool": POOL,
                    "strategy": strategy,
                    "params": params,
                    "prune_fraction": prune,
                    "seed": seed,
                    "recipe": "digits",
                    "checkpoint": checkpoint,
                    "eps_train": EPS,
                    "clean_accuracy": float(clean.mean()),
                    "robust_accuracy": float(robust.mean()),
                    "apgd_accuracy": float(robust.mean()) + 0.01,
                    "pgd_accuracy": None,
                    "n_test": N_TEST,
                    "n_pgd": 0,
                    "kept": REAL + SYNTHETIC - round(SYNTHETIC * prune),
                    "mean_eps": EPS * scale,
                    "attack_cost": 11.0 * 128 * 500,
                    "steps": 500,
                }
                rows.append(row)
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    """``results.parquet`` with these rows, perhaps none."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "results.parquet")


def write_records(folder: Path) -> None:
    """``done/CELL.json`` for each cell of ``results.parquet``: its rows, as a study records them."""
    cells: dict[str, list[dict]] = {}
    for row in pq.read_table(folder / "results.parquet").to_pylist():
        key = key_of(row["strategy"], row["params"], row["prune_fraction"], row["seed"], row["recipe"])
        cells.setdefault(key, []).append(row)
    (folder / "done").mkdir(exist_ok=True)
    for key, rows in cells.items():
        (folder / "done" / f"{key}.json").write_text(json.dumps({"rows": rows}))


def write_run(folder: Path, strategy: str, params: str, prune: float, seed: int) -> None:
    """A run's folder: metrics, recipe and the flags of its evaluation."""
    folder.mkdir(parents=True)
    clean, robust = draw_flags(strategy, params, prune, seed, 0.0)
    flags = {
        "index": np.arange(N_CLEAN),
        "clean_correct": clean,
        "robust": pa.array([*robust.tolist(), *[None] * (N_CLEAN - N_TEST)], pa.bool_()),
    }
    meta = {b"puma": json.dumps({"attack": "standard"}).encode()}
    pq.write_table(pa.table(flags).replace_schema_metadata(meta), folder / "evaluation.parquet")
    evaluation = {
        "attack": "standard",
        "clean_accuracy": float(clean.mean()),
        "clean_interval": [0.9, 0.99],
        "attacked_accuracy": float(robust.mean()),
        "robust_interval": [0.4, 0.6],
        "n_test": N_TEST,
        "n_clean": N_CLEAN,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "recipe.toml").write_text('name = "digits"\nsteps = 500\nbeta = 5.0\n')
    steps, shift = np.arange(50, 501, 50), ARMS[strategy, params, prune][0] - 0.95
    lines = ["step,loss,clean_accuracy,adversarial_accuracy,validation_clean,validation_robust"]
    for step in steps:
        done, robust_at = step / 500, min(0.55, 0.3 + step / 1500) - 0.02 * (step > 450)
        lines.append(
            f"{step},{2 - done - 4 * shift:.4f},{0.5 + done / 2.2 + shift:.4f},{0.3 + done / 4:.4f},0.9,{robust_at:.4f}"
        )
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_study_flags(folder: Path) -> None:
    """``flags.parquet`` of every row of ``results.parquet``, under AutoAttack standard."""
    flags = []
    for run in read_runs(pq.read_table(folder / "results.parquet").to_pylist()):
        where = (run.setting.strategy, run.setting.params, run.setting.prune_fraction)
        clean, robust = draw_flags(*where, run.seed, 0.01 if run.group.checkpoint == "best" else 0.0)
        attacked = np.concatenate([robust, np.full(N_CLEAN - N_TEST, np.nan)])
        flags.append((run.key, (Flags(clean.astype(float), attacked), "standard")))
    write_flags(folder / "flags.parquet", flags, {})


def _table(pool: Pool) -> MarginTable:
    rng = np.random.default_rng(3)
    n = len(pool)
    brightness = pool.read(slice(None)).mean(axis=(1, 2, 3)) / 255
    margin = (0.25 + 1.2 * (brightness - brightness.mean()) + rng.normal(0, 0.08, n)).astype(np.float32)
    status = np.where(margin < 0, Status.MISCLASSIFIED.value, Status.CROSSED.value).astype(np.int8)
    status[5], margin[5] = Status.UNCONVERGED.value, np.nan
    source = np.repeat([0, 1], [REAL, SYNTHETIC])
    meta = {"norm": "Linf", "mode": "refined", "settings": {"steps": 50}, "model": "0" * 64, "pool": pool.describe()}
    label = pool.labels
    return MarginTable(
        label, np.where(margin < 0, (label + 1) % 10, label), margin, status, np.full(n, 3), source, meta
    )


def _plan(table: MarginTable, strategy: str, params: str, prune: float, seed: int) -> Plan:
    n = len(table)
    margin = np.nan_to_num(table.margin, nan=0.3)
    rng = np.random.default_rng(1)
    order = {"difficult": margin, "random": rng.random(n)}.get(strategy, -margin)
    keep = np.ones(n, dtype=bool)
    prunable = np.flatnonzero(table.synthetic)
    keep[prunable[np.argsort(order[prunable])][: round(prune * len(prunable))]] = False
    capped = strategy in {"puma", "puma-plus", "cap-only", "puma-shuffled"}
    scale = json.loads(params).get("scale", 1.0)
    eps = np.minimum(EPS, 0.5 * np.maximum(margin, 0)) if capped else np.full(n, EPS * scale)
    meta = {
        "strategy": strategy, "params": {**json.loads(params), "default": 1}, "prune_fraction": prune, "seed": seed,
        "protect_real": True, "class_balanced": True, "threat": {"norm": "Linf", "eps": EPS},
        "table": table.fingerprint, "pool": table.meta["pool"],
        "counts": {"kept": int(keep.sum())}, "derived": {}, "warnings": [],
    }  # fmt: skip
    return Plan(keep, np.where(keep, eps, 0).astype(np.float32), meta)


def write_study(folder: Path, name: str = "made up", seeds: int = 2, companions: bool = True) -> Path:
    """A study folder; with ``companions`` also its settings, images, margins, plans, runs and measurements."""
    write_results(folder, name, seeds)
    if not companions:
        return folder
    (folder / "study.toml").write_text(
        f'name = {json.dumps(name)}\nthreat = "Linf:{EPS}"\nrecipe = "digits"\n\n[pool]\nreal = "digits:train"\n'
        f'test = "digits:test"\nsynthetic = {SYNTHETIC}\n\n[network]\nname = "small-cnn"\n\n'
        '[[grid]]\nstrategies = ["none"]\nseeds = [0]\n'
    )
    digits = load_digits()
    images = np.round(digits.images[:SYNTHETIC] / 16 * 255).astype(np.uint8)[..., None]
    (folder / "synthetic").mkdir()
    np.savez(folder / "synthetic" / "images.npz", image=images, label=digits.target[:SYNTHETIC].astype(np.int64))
    quality = {"label_agreement": 0.97, "neighbor": {"synthetic_to_train": {"mean": 0.123}, "copies": 0}}
    (folder / "done").mkdir(exist_ok=True)
    (folder / "done" / "synthetic.json").write_text(json.dumps({"quality": quality}))
    pool = Pool([load_dataset("digits:train"), load_dataset(str(folder / "synthetic" / "images.npz"))])
    table = _table(pool)
    table.write(folder / "margins")
    write_records(folder)
    shares = []
    for arm in ARMS:
        for seed in range(seeds):
            key = key_of(*arm, seed)
            _plan(table, *arm, seed).write(folder / "plans" / f"{key}.parquet")
            write_run(folder / "runs" / key, *arm, seed)
            share = 0.05 + 0.1 * ARMS[arm][1] + 0.004 * seed
            where = {
                "strategy": arm[0],
                "params": arm[1],
                "pool": POOL,
                "recipe": "digits",
                "prune_fraction": arm[2],
                "seed": seed,
            }
            shares.append(where | {"share": share, "by_attack": share / 2})
    pq.write_table(pa.Table.from_pylist(shares), folder / "mislabelled.parquet")
    write_study_flags(folder)
    return folder
