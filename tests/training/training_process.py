"""A training in a process of its own, for tests that kill it; also a program for torchrun: OUT [FIELD=VALUE ...]."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.models.networks import build_model
from puma.models.weights import weights_sha256
from puma.threat import ThreatModel
from puma.training import loop
from puma.training.batches import Validation
from puma.training.recipe import load_recipe, parse_changes


def work(say, out, *pairs):
    """Train, telling ``say`` of every step, of every network that is validated and of the weights at the end."""
    torch.set_num_threads(1)
    changes = parse_changes(pairs)
    norm, slow, slow_disk = changes.pop("norm", "batch"), changes.pop("slow", 0), changes.pop("slow_disk", 0)
    settings = {
        "steps": 24, "batch_size": 32, "attack_steps": 2, "log_every": 5, "checkpoint_every": 4, "crop": 1,
        "validation_images": 40, "validation_every": 6, "validation_steps": 2, "cycle_momentum": True,
    }  # fmt: skip
    pool = Pool([load_dataset("digits"), load_dataset("digits:test")])
    model = build_model("small-cnn", 10, in_channels=1, image_size=8, norm=norm)
    take_step = loop.Training.take_step

    def reported(training, step):
        take_step(training, step)
        say({"step": step, "rank": training.devices.rank, "pid": os.getpid()})
        time.sleep(slow)

    loop.Training.take_step = reported
    measure = Validation.measure

    def telling(validation, model):
        say({"validated": weights_sha256(model)})
        return measure(validation, model)

    Validation.measure = telling
    for name in ("save_state", "save_model") if slow_disk else ():  # called by the first process only
        setattr(loop, name, partial(_slowly, getattr(loop, name), slow_disk, say))
    recipe = load_recipe("digits", **(settings | changes))
    try:
        run = loop.train(model, pool, threat=ThreatModel("Linf", 0.2), recipe=recipe, out=out, device="cpu")
    finally:
        say({"ends": time.monotonic()})
    say({"last": weights_sha256(run.model), "best": weights_sha256(run.best)})


def _slowly(write, seconds, say, *arguments, **options):
    time.sleep(seconds)
    write(*arguments, **options)
    say({"written": time.monotonic()})


class Training:
    """`work` in a fork of a server that has everything imported and has computed nothing."""

    def __init__(self, out, *pairs):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["training_process", "lightning_fabric"])
        self._ours, theirs = context.Pipe()
        self.process = context.Process(target=_child, args=(theirs, str(out), *pairs))
        self.process.start()
        theirs.close()
        self.said = []

    def until_step(self, step):
        """Read what it says until it has taken ``step``."""
        while self.said[-1:] != [step]:
            message = self._read()
            self.said.append(message.get("step", message))
        return self

    def ended(self, number=None):
        """Send it a signal if there is one; its exit code once it has ended (minus the signal that ended it)."""
        if number is not None:
            os.kill(self.process.pid, number)
        try:
            while True:
                self.said.append(self._read())
        except EOFError:
            self.process.join(120)
        return self.process.exitcode

    @property
    def log(self):
        return "\n".join(message["log"] for message in self.said if isinstance(message, dict) and "log" in message)

    def _read(self):
        assert self._ours.poll(240), "the training says nothing"
        return self._ours.recv()


def _child(connection: Connection, out, *pairs):
    class Handler(logging.Handler):
        def emit(self, record):
            connection.send({"log": record.getMessage()})

    logging.getLogger("puma").addHandler(Handler())
    work(connection.send, Path(out), *pairs)


if __name__ == "__main__":
    work(lambda message: os.write(1, f"{json.dumps(message)}\n".encode()), *sys.argv[1:])  # one write a line
