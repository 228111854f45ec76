"""A training in a process of its own, for tests that kill it: python training_process.py OUT [FIELD=VALUE ...]."""

from __future__ import annotations

import json
import os
import sys
import time

import torch  # noqa: E402

torch.set_num_threads(1)

from puma.cli.train import _changes
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.models.build import build_model
from puma.models.weights import weights_sha256
from puma.recipe import load_recipe
from puma.threat import ThreatModel
from puma.training import loop


def main() -> None:
    out, *pairs = sys.argv[1:]
    changes = _changes(pairs)
    norm, slow = changes.pop("norm", "batch"), changes.pop("slow", 0)
    settings = {
        "steps": 24, "batch_size": 32, "attack_steps": 2, "log_every": 5, "checkpoint_every": 4, "crop": 1,
        "validation_images": 40, "validation_every": 6, "validation_steps": 2, "cycle_momentum": True,
    }  # fmt: skip
    recipe = load_recipe("digits", **(settings | changes))
    pool = Pool([load_dataset("digits"), load_dataset("digits:test")])
    model = build_model("small-cnn", 10, in_channels=1, image_size=8, norm=norm)
    before = loop.Training._take_step

    def reported(training: loop.Training, step: int) -> None:
        before(training, step)
        time.sleep(slow)
        print(f"step {step} of rank {training.devices.rank} pid {os.getpid()}", flush=True)

    loop.Training._take_step = reported
    threat = ThreatModel("Linf", 0.2)
    run = loop.train(model, pool, threat=threat, recipe=recipe, out=out, accelerator="cpu")
    print(json.dumps({"last": weights_sha256(run.model), "best": weights_sha256(run.best)}), flush=True)


if __name__ == "__main__":
    main()
