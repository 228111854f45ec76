"""`evaluate`: the front door. It checks, finds what is already there, and lets a `Job` do the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from puma.data.source import MapStyle, Source
from puma.errors import DataError, ResumeError, UsageError
from puma.evaluation.attacks import attack_steps
from puma.evaluation.job import Job
from puma.evaluation.network import judged
from puma.evaluation.result import Evaluation
from puma.evaluation.testset import open_test_set
from puma.io import lock, prepare_folder, read_json, write_json
from puma.models.weights import weights_sha256
from puma.threat import ThreatModel

logger = logging.getLogger("puma")
_SETTINGS = "settings.json"


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
    batch_size: int = 256,
    piece_rows: int = 1024,
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
        batch_size: images attacked together; the attacks' random numbers depend on it.
        piece_rows: images of a piece, the unit of resuming (with each attack) and of sharing among workers.
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
    settings = {
        "model": weights_sha256(model),
        "architecture": getattr(model, "config", None) or type(model).__qualname__,
        "dataset": test.fingerprint,
        "images": len(test),
        "threat": [threat.norm, threat.eps],
        "attack": attack,
        "steps": list(steps),
        "subset": None if len(test.rows) == len(test) else len(test.rows),
        "subset_seed": subset_seed,
        "seed": seed,
        "batch_size": batch_size,
        "piece_rows": piece_rows,
    }
    stem = "evaluation" if attack == "standard" else f"evaluation-{attack}"
    if (found := _finished(folder, stem, settings)) is not None:
        return found
    pieces_folder = _open_pieces(folder, stem, settings)
    job = Job(model, test, threat, attack, steps, settings, pieces_folder, checkpoint)
    guard = nullcontext() if pieces_folder is None else lock(pieces_folder, f".lock-{worker}-of-{num_workers}")
    with guard, judged(model):
        result = job.run(worker, num_workers, progress)
    if folder is not None and result.complete:
        result.write(folder / f"{stem}.json")
    for warning in result.warnings:
        logger.warning("AutoAttack warns (%s): %s. What to do: %s.", warning["flag"], warning["means"], warning["do"])
    return result


def _check_shares(out: Path | str | None, batch_size: int, piece_rows: int, worker: int, num_workers: int) -> None:
    for name, value in (("batch_size", batch_size), ("piece_rows", piece_rows)):
        if value < 1:
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
