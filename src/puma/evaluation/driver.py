"""`evaluate`: all of the test set clean, then attacked piece by piece, each attack only on what still stands."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma._version import __version__
from puma.data.source import Source
from puma.errors import CheckError, DataError, ModelError, ResumeError, UsageError
from puma.evaluation.attacks import Attacker, attack_steps, check_classes, check_model, full_cost
from puma.evaluation.flags import FlagRecorder, explain
from puma.evaluation.network import (
    CountedNetwork,
    check_alone_equals_batch,
    check_logits,
    device_of,
    judged,
)
from puma.evaluation.pieces import CLEAN, Piece, read_piece, split_rows, write_piece
from puma.evaluation.result import Evaluation
from puma.evaluation.testset import MapStyle, TestSet, open_test_set
from puma.files import fingerprint, lock, prepare_folder, read_json, write_json
from puma.models.weights import weights_sha256
from puma.progress import Progress
from puma.threat import ThreatModel

logger = logging.getLogger("puma")
_SETTINGS = "settings.json"
_SLACK = 1e-5  # float32 rounding of x + delta, in pixel units
_KNIFE_EDGE = 1e-3  # a logit gap below this may change sign with the composition of the batch


def evaluate(
    model: nn.Module,
    dataset: Source | MapStyle,
    threat: ThreatModel,
    *,
    out: Path | str | None = None,
    subset: int | None = None,
    subset_seed: int = 0,
    seed: int = 0,
    attack: str = "standard",
    batch_size: int | None = None,
    piece_rows: int | None = None,
    checkpoint: str = "last",
    worker: int = 0,
    num_workers: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Judge ``model``: clean accuracy on every test image, accuracy under attack on every one or on a subset.

    The model is judged in eval mode and float32, where it lies; its mode and its weights stay as they are. Run again
    with the same arguments, an evaluation in ``out`` goes on where it stopped, and a finished one is read.

    Args:
        model: maps float images ``[B, C, H, W]`` in [0, 1] to logits; normalises inside.
        dataset: test images: a puma source, or any map-style dataset of ``(uint8 [H, W, C], label)``.
        threat: norm and radius.
        out: folder for ``evaluation.json``, the flags of every image (``evaluation.parquet``) and the pieces; None
            keeps nothing. Attacks other than ``"standard"`` write ``evaluation-ATTACK.json`` beside it.
        subset: attack a stratified choice of this many images only; clean accuracy is always of all.
        subset_seed: seed of that choice; the same for all models that are to be compared.
        seed: every batch of AutoAttack starts from it.
        attack: ``"standard"`` (AutoAttack), or ``"apgd-ce"``, ``"pgd-20"``, ``"cw-20"`` (CW loss; any number of
            steps), or ``"clean"``.
        batch_size: images attacked together; the attacks' random numbers depend on it. Default by image size.
        piece_rows: images of a piece, the unit of resuming and sharing; default four batches (one for small images).
        checkpoint: which model of a run this is, for the record.
        worker: this process's number, from 0 to ``num_workers`` - 1.
        num_workers: processes that share the pieces through ``out``; who finishes last writes the result.
        progress: show progress.

    Returns:
        The evaluation. With several workers it is ``complete`` only in (and after) the last one.

    Raises:
        UsageError: unknown attack, bad sizes, or AutoAttack on fewer than four classes.
        DataError: images or labels that cannot be used.
        ModelError: not float32, NaN logits, too few classes, or answers that depend on the batch.
        ResumeError: ``out`` holds an evaluation of another model, test set or setting.
        StorageError: ``out`` cannot be written.
        CheckError: an attack's images break the threat model, or re-evaluation contradicts it.
    """
    steps = attack_steps(attack)
    _check_shares(out, batch_size, piece_rows, worker, num_workers)
    folder = None if out is None else prepare_folder(out)
    test = open_test_set(dataset, subset, subset_seed)
    pixels = int(np.prod(test.source.read(test.rows[:1]).shape[1:]))
    batch = batch_size or (512 if pixels <= 1024 else 250)
    size = piece_rows or (batch if pixels <= 1024 else 4 * batch)
    settings = {
        "model": weights_sha256(model),
        "architecture": type(model).__qualname__,
        "dataset": test.fingerprint,
        "images": len(test),
        "threat": [threat.norm, threat.eps],
        "attack": attack,
        "steps": list(steps),
        "subset": None if len(test.rows) == len(test) else len(test.rows),
        "subset_seed": subset_seed,
        "seed": seed,
        "batch_size": batch,
        "piece_rows": size,
    }
    stem = "evaluation" if attack == "standard" else f"evaluation-{attack}"
    if (found := _finished(folder, stem, settings)) is not None:
        return found
    pieces_folder = _open_pieces(folder, stem, settings)
    job = _Job(model, test, threat, steps, settings, pieces_folder, checkpoint)
    guard = nullcontext() if pieces_folder is None else lock(pieces_folder, f".lock-{worker}-of-{num_workers}")
    with guard, judged(model):
        result = job.run(attack, worker, num_workers, progress)
    if folder is not None and result.complete:
        result.write(folder / f"{stem}.json")
    for warning in result.warnings:
        logger.warning("AutoAttack warns (%s): %s. What to do: %s.", warning["flag"], warning["means"], warning["do"])
    return result


def _check_shares(
    out: Path | str | None, batch_size: int | None, piece_rows: int | None, worker: int, num_workers: int
) -> None:
    for name, value in (("batch_size", batch_size), ("piece_rows", piece_rows)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} is not a number of images", fix="1 or more")
    if not 0 <= worker < num_workers:
        raise UsageError(f"worker {worker} of {num_workers} does not exist", fix="numbers run from 0")
    if num_workers > 1 and out is None:
        raise UsageError("several workers need a folder to share", fix="give out=")


def _finished(folder: Path | None, stem: str, settings: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation that lies in ``folder``, if it is whole and of the same settings."""
    if folder is None or not (folder / f"{stem}.json").is_file():
        return None
    try:
        found = Evaluation.read(folder / f"{stem}.json")
    except DataError:
        return None  # the pieces are still there: it is put together again
    _compare(folder / f"{stem}.json", found.meta["settings"], settings)
    return found


def _open_pieces(folder: Path | None, stem: str, settings: Mapping[str, Any]) -> Path | None:
    if folder is None:
        return None
    pieces = prepare_folder(folder / f"{stem}-pieces")
    if (pieces / _SETTINGS).is_file():
        _compare(pieces / _SETTINGS, read_json(pieces / _SETTINGS), settings)
    else:
        write_json(pieces / _SETTINGS, dict(settings))
    return pieces


def _compare(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    different = [key for key in here if there.get(key) != here[key]]
    if different:
        raise ResumeError(
            f"{path} is of another evaluation",
            why="; ".join(f"{key}: there {there.get(key)!r}, now {here[key]!r}" for key in different),
            fix="choose another folder, or move that evaluation away",
        )


@dataclass
class _Job:
    """One evaluation in progress."""

    model: nn.Module
    test: TestSet
    threat: ThreatModel
    steps: tuple[str, ...]
    settings: dict[str, Any]
    folder: Path | None
    checkpoint: str

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self.network = CountedNetwork(self.model)
        self.identity = fingerprint(self.settings)
        self.batch = int(self.settings["batch_size"])
        self.recorder = FlagRecorder()

    def run(self, attack: str, worker: int, num_workers: int, show: bool) -> Evaluation:
        """Judge clean, attack this worker's share, and put together what is finished."""
        clean, classes = self._clean(show)
        check_classes(attack, classes)
        attacker = Attacker(
            self.network,
            self.threat,
            classes=classes,
            seed=int(self.settings["seed"]),
            device=self.device,
            recorder=self.recorder,
        )
        rows = split_rows(self.test.rows, int(self.settings["piece_rows"])) if self.steps else []
        pieces = [self._piece(number, share, clean) for number, share in enumerate(rows)]
        mine = [piece for piece in pieces if piece.number % num_workers == worker]
        per_image = sum(full_cost(step, attacker.targets) for step in self.steps)
        total = sum(int(clean[piece.rows].sum()) for piece in mine) * per_image
        done = total - sum(self._left(piece, attacker.targets) for piece in mine)
        label = {"standard": "AutoAttack", "clean": "clean"}.get(attack, attack)
        with Progress(label, total, "passes", show=show and bool(self.steps), done=done) as bar:
            self.network.on_pass = bar.advance
            for piece in mine:
                self._attack(piece, attacker, bar)
            self.network.on_pass = None
        others = [piece for piece in pieces if piece.number % num_workers != worker]
        pieces = sorted([*mine, *(self._piece(p.number, p.rows, clean) for p in others)], key=lambda p: p.number)
        return self._result(attack, clean, pieces)

    def _clean(self, show: bool) -> tuple[NDArray[np.bool_], int]:
        """Which images are classified correctly without attack, and the number of classes."""
        correct = np.zeros(len(self.test), dtype=bool)
        classes = 0
        with Progress("clean", len(self.test), "images", show=show) as bar, torch.no_grad():
            for rows in split_rows(np.arange(len(self.test)), self.batch):
                images, labels = self.test.batch(rows, self.device)
                try:
                    logits = self.network(images)
                except RuntimeError as error:
                    raise ModelError(f"the model fails on images {list(images.shape)}", why=str(error)) from error
                check_logits(logits, images, int(self.test.labels.max()))
                if not classes:
                    classes = logits.shape[1]
                    check_alone_equals_batch(self.network, images[:8])
                correct[rows] = (logits.argmax(1) == labels).cpu().numpy()
                bar.advance(len(rows))
        return correct, classes

    def _piece(self, number: int, rows: NDArray[np.int64], clean: NDArray[np.bool_]) -> Piece:
        """A piece as it was left, or new."""
        found = read_piece(self.folder, number, rows, self.identity)
        if found is not None:
            return found
        broken_by = np.where(clean[rows], None, CLEAN)  # type: ignore[call-overload]
        return Piece(number, rows, self.test.labels[rows], broken_by)

    def _left(self, piece: Piece, targets: int) -> int:
        return int(piece.robust.sum()) * sum(full_cost(step, targets) for step in self.steps[piece.done :])

    def _attack(self, piece: Piece, attacker: Attacker, bar: Progress) -> None:
        """Send ``piece`` through the attacks it has not seen."""
        if piece.number == 0 and not piece.done:
            images, labels = self.test.batch(piece.rows[: self.batch], self.device)
            check_model(CountedNetwork(self.model), images, labels, self.recorder)
        for step in self.steps[piece.done :]:
            left = bar.total - bar.done, self._left(piece, attacker.targets)
            started, cost = time.perf_counter(), self.network.cost
            survivors = np.flatnonzero(piece.robust)
            found = (
                0
                if self.threat.eps == 0
                else sum(
                    self._attack_batch(piece, step, places, attacker) for places in split_rows(survivors, self.batch)
                )
            )
            piece.log.append(
                {
                    "attack": step,
                    "piece": piece.number,
                    "images": len(survivors),
                    "broken": found,
                    "knife_edge": self._knife_edge,
                    "cost": self.network.cost - cost,
                    "seconds": round(time.perf_counter() - started, 3),
                }
            )
            self._knife_edge = 0
            piece.flags += self.recorder.raised
            self.recorder.raised.clear()
            write_piece(self.folder, piece, self.identity)
            # images that fell need no further attack: what they would have cost counts as done
            target = bar.total - (left[0] - left[1] + self._left(piece, attacker.targets))
            bar.advance(target - bar.done, f"{step}: {piece.robust.mean():.1%} of piece {piece.number} stand")

    _knife_edge = 0

    def _attack_batch(self, piece: Piece, step: str, places: NDArray[np.int64], attacker: Attacker) -> int:
        """Attack one batch; mark and count the images that fell."""
        images, labels = self.test.batch(piece.rows[places], self.device)
        adversarial = attacker.perturb(step, images, labels, int(piece.rows[places[0]]))
        with torch.no_grad():
            fell = self.network(adversarial).argmax(1) != labels
            self._confirm(step, images[fell], adversarial[fell], labels[fell])
        broken = places[fell.cpu().numpy()]
        piece.broken_by[broken] = step
        return len(broken)

    def _confirm(self, step: str, images: Tensor, adversarial: Tensor, labels: Tensor) -> None:
        """Judge the images that fell once more, in another batch, and hold them against the threat model.

        Raises:
            CheckError: outside the threat model, not finite, or correct after all beyond rounding.
        """
        if not len(images):
            return
        delta = (adversarial - images).flatten(1)
        size = delta.abs().amax(1) if self.threat.norm == "Linf" else delta.norm(dim=1)
        outside = ~(size <= self.threat.eps + _SLACK) | ~((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
        logits = self.network(adversarial.flip(0)).flip(0)
        if not bool(torch.isfinite(logits).all()):
            raise CheckError(
                f"the model's logits are NaN or infinite for images that {step} made",
                why="they would count as broken without being adversarial",
                fix="look for a division, logarithm or overflow in the model",
            )
        if bool(outside.any()):
            raise CheckError(
                f"{int(outside.sum())} images that {step} made lie outside {self.threat} or [0, 1]",
                why=f"the largest perturbation is {float(size.max()):.6g}",
                fix="please report this: the figure would be too low",
            )
        own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        best = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
        again = own > best
        contradicted = again & (own - best > _KNIFE_EDGE * logits.abs().amax(1).clamp_min(1))
        if bool(contradicted.any()):
            raise CheckError(
                f"{int(contradicted.sum())} of {len(images)} images broken by {step} are correct when judged again",
                why="the model's answers change from call to call or with the batch",
                fix="switch dropout and noise off at test time",
            )
        self._knife_edge += int(again.sum())

    def _result(self, attack: str, clean: NDArray[np.bool_], pieces: list[Piece]) -> Evaluation:
        finished = [piece for piece in pieces if piece.done == len(self.steps)]
        attacked = np.zeros(len(self.test), dtype=bool)
        robust = np.zeros(len(self.test), dtype=bool)
        broken_by = np.where(clean, None, CLEAN)  # type: ignore[call-overload]
        flags: Counter[str] = Counter(self.recorder.raised)
        for piece in finished:
            attacked[piece.rows], robust[piece.rows] = True, piece.robust
            broken_by[piece.rows] = piece.broken_by
            flags += piece.flags
        by_square = sum(int((piece.broken_by == "square").sum()) for piece in finished)
        if by_square > 0.002 * max(int(attacked.sum()), 1):  # the threshold of AutoAttack's own check
            flags["square-gains"] += 1
        meta = {
            "checkpoint": self.checkpoint,
            "identity": self.identity,
            "settings": self.settings,
            "environment": _environment(self.device),
            "log": [entry for piece in finished for entry in piece.log],
            "warnings": explain(flags),
        }
        complete = len(finished) == len(pieces)
        return Evaluation(
            self.threat, attack, self.test.labels, clean, attacked, robust, broken_by, meta, complete=complete
        )


def _environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "puma": __version__,
        "torch": torch.__version__,
        "pyautoattack": version("pyautoattack"),
        "device": name,
        "threads": torch.get_num_threads(),
    }
