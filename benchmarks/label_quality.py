"""Which wrong labels of "generated" images are found, and which right ones are accused.

    OMP_NUM_THREADS=1 python benchmarks/label_quality.py

Unseen real digits stand in for generated ones, so that their true labels are known; a tenth gets the label of another
class. The margin model, a small CNN adversarially trained for 150 steps on the real split, never saw them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.scoring.labels import score_labels
from puma.threat import ThreatModel
from puma.training.loop import train
from puma.training.recipe import load_recipe


def one_seed(seed: int, share: float, folder: Path) -> dict[str, object]:
    """Counts of one model and one draw of wrong labels."""
    real, unseen = load_dataset("digits"), load_dataset("digits:test")
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(unseen)) < share
    labels = np.where(wrong, (unseen.labels + rng.integers(1, 10, len(unseen))) % 10, unseen.labels)
    np.savez(folder / f"made-{seed}.npz", image=unseen.read(slice(None)), label=labels)
    pool = Pool([real, load_dataset(folder / f"made-{seed}.npz")])
    recipe = load_recipe("digits", steps=150)
    run = train("small-cnn", real, threat=ThreatModel("Linf", 0.1), recipe=recipe, seed=seed, validation=0)
    table = score_labels(run.model.eval(), pool, out=folder / f"scores-{seed}")
    found: dict[str, object] = {
        "wrong": int(wrong.sum()),
    }
    quality = table.scores["label_quality"]
    rules = {"label_issue": table.scores["label_issue"] == 1}
    rules |= {f"label_quality < {below}": quality < below for below in (0.5, 0.25)}
    for name, flagged in rules.items():
        accused = flagged[len(real) :]
        found[name] = {"found": int((accused & wrong).sum()), "accused_wrongly": int((accused & ~wrong).sum())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1, help="of wrong labels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [one_seed(seed, options.share, Path(folder)) for seed in range(options.seeds)]
    print(json.dumps({"images": 899, "seeds": seeds, "torch": torch.__version__}, indent=2))


if __name__ == "__main__":
    main()
