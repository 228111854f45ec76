"""An evaluation at work: every image clean, then piece by piece through the attacks, each on what still stands."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma._version import __version__
from puma.errors import ModelError
from puma.evaluation.attacks import Attacker, check_classes, check_model, full_cost
from puma.evaluation.confirm import confirm
from puma.evaluation.flags import FlagRecorder, explain
from puma.evaluation.network import CountedNetwork, check_alone_equals_batch, check_logits, device_of
from puma.evaluation.pieces import CLEAN, Piece, read_piece, split_rows, write_piece
from puma.evaluation.result import Evaluation
from puma.evaluation.testset import TestSet
from puma.io import fingerprint
from puma.progress import Progress
from puma.threat import ThreatModel

_SQUARE_GAIN = 0.002  # the threshold of AutoAttack's own check, applied to all pieces together


@dataclass
class Job:
    """What is judged, how, and where the pieces lie.

    Args:
        model: in eval mode, frozen (`puma.evaluation.network.judged`).
        test: images, labels, rows to attack.
        threat: norm and radius.
        attack: name of the attack.
        steps: the attacks it runs, in order.
        settings: everything that decides the flags; a piece of other settings is never used.
        folder: of the pieces, or None.
        checkpoint: which model of a run this is, for the record.
    """

    model: nn.Module
    test: TestSet
    threat: ThreatModel
    attack: str
    steps: Sequence[str]
    settings: Mapping[str, Any]
    folder: Path | None
    checkpoint: str

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self.network = CountedNetwork(self.model)
        self.identity = fingerprint(dict(self.settings))
        self.batch = int(self.settings["batch_size"])
        self.recorder = FlagRecorder()

    def run(self, worker: int, num_workers: int, show: bool) -> Evaluation:
        """Judge clean, attack this worker's share of the pieces, and put together what is finished."""
        clean, classes = self._judge_clean(show)
        check_classes(self.attack, classes)
        self.attacker = Attacker(
            self.network,
            self.threat,
            classes=classes,
            seed=int(self.settings["seed"]),
            device=self.device,
            recorder=self.recorder,
        )
        rows = split_rows(self.test.rows, int(self.settings["piece_rows"])) if self.steps else []
        pieces = [self._open(number, share, clean) for number, share in enumerate(rows)]
        mine = pieces[worker::num_workers]
        total = sum(int(clean[piece.rows].sum()) for piece in mine) * self._cost(self.steps)
        done = total - sum(self._left(piece) for piece in mine)
        name = "AutoAttack" if self.attack == "standard" else self.attack
        with Progress(name, total, "passes", show=show and bool(self.steps), done=done) as bar:
            self.network.on_pass = bar.advance
            for piece in mine:
                self._attack(piece, bar)
            self.network.on_pass = None
        for number in set(range(len(pieces))) - {piece.number for piece in mine}:  # others may have gone on meanwhile
            pieces[number] = self._open(number, rows[number], clean)
        return self._result(clean, pieces)

    def _judge_clean(self, show: bool) -> tuple[NDArray[np.bool_], int]:
        """Which images are classified correctly without attack, bool ``[N]``, and the number of classes."""
        correct = np.zeros(len(self.test), dtype=bool)
        classes, highest = 0, int(self.test.labels.max())
        with Progress("clean", len(self.test), "images", show=show) as bar, torch.no_grad():
            for rows in split_rows(np.arange(len(self.test)), self.batch):
                images, labels = self.test.batch(rows, self.device)
                try:
                    logits = self.network(images)
                except RuntimeError as error:
                    raise ModelError(f"the model fails on images {list(images.shape)}", why=str(error)) from error
                check_logits(logits, images, highest)
                if not classes:
                    classes = logits.shape[1]
                    check_alone_equals_batch(self.network, images[:8])
                correct[rows] = (logits.argmax(1) == labels).cpu().numpy()
                bar.advance(len(rows))
        return correct, classes

    def _open(self, number: int, rows: NDArray[np.int64], clean: NDArray[np.bool_]) -> Piece:
        """A piece as it was left, or new."""
        found = read_piece(self.folder, number, rows, self.identity)
        return found or Piece.new(number, rows, self.test.labels[rows], clean[rows])

    def _attack(self, piece: Piece, bar: Progress) -> None:
        """Send a piece through the attacks it has not seen; write it after each."""
        if piece.number == 0 and not piece.log:
            images, labels = self.test.batch(piece.rows[: self.batch], self.device)
            check_model(CountedNetwork(self.model), images, labels, self.recorder)
        for step in self.steps[len(piece.log) :]:
            goal = bar.done + self._left(piece)
            piece.log.append(self._attack_once(piece, step))
            piece.flags += self.recorder.raised
            self.recorder.raised.clear()
            write_piece(self.folder, piece, self.identity)
            # what the fallen images would have cost in later attacks counts as done
            standing = f"{piece.robust.mean():.1%} stand after {step}"
            bar.advance(
                goal - self._left(piece) - bar.done,
                standing if not piece.number else f"{standing} in piece {piece.number}",
            )

    def _attack_once(self, piece: Piece, step: str) -> dict[str, Any]:
        """Attack what stands of a piece, mark what falls, and return the entry for the log."""
        started, cost = time.perf_counter(), self.network.cost
        survivors = np.flatnonzero(piece.robust)
        broken = knife_edge = 0
        for places in split_rows(survivors, self.batch) if self.threat.eps else []:
            images, labels = self.test.batch(piece.rows[places], self.device)
            adversarial = self.attacker.perturb(step, images, labels, int(piece.rows[places[0]]))
            with torch.no_grad():
                fell = self.network(adversarial).argmax(1) != labels
                knife_edge += confirm(self.network, images[fell], adversarial[fell], labels[fell], self.threat, step)
            piece.broken_by[places[fell.cpu().numpy()]] = step
            broken += int(fell.sum())
        return {
            "attack": step,
            "piece": piece.number,
            "images": len(survivors),
            "broken": broken,
            "knife_edge": knife_edge,
            "cost": self.network.cost - cost,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _left(self, piece: Piece) -> int:
        """What the attacks still to come cost at most, in forward-equivalents."""
        return int(piece.robust.sum()) * self._cost(self.steps[len(piece.log) :])

    def _cost(self, steps: Sequence[str]) -> int:
        return sum(full_cost(step, self.attacker.targets) for step in steps)

    def _result(self, clean: NDArray[np.bool_], pieces: list[Piece]) -> Evaluation:
        finished = [piece for piece in pieces if len(piece.log) == len(self.steps)]
        attacked, robust = np.zeros((2, len(self.test)), dtype=bool)
        broken_by = np.full(len(self.test), None, dtype=object)
        broken_by[~clean] = CLEAN
        flags: Counter[str] = Counter()
        for piece in finished:
            attacked[piece.rows], robust[piece.rows], broken_by[piece.rows] = True, piece.robust, piece.broken_by
            flags += piece.flags
        if (broken_by == "square").sum() > _SQUARE_GAIN * max(int(attacked.sum()), 1):
            flags["square-gains"] += 1
        meta = {
            "checkpoint": self.checkpoint,
            "identity": self.identity,
            "settings": dict(self.settings),
            "environment": _environment(self.device),
            "log": [entry for piece in finished for entry in piece.log],
            "warnings": explain(flags),
        }
        return Evaluation(
            threat=self.threat,
            attack=self.attack,
            label=self.test.labels,
            clean_correct=clean,
            attacked=attacked,
            robust=robust,
            broken_by=broken_by,
            meta=meta,
            complete=len(finished) == len(pieces),
        )


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "puma": __version__,
        "torch": torch.__version__,
        "pyautoattack": version("pyautoattack"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }
