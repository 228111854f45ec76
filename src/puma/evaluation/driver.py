"""`evaluate`: clean accuracy of every image, then the test set shard by shard through the attacks, resumable.

The model is in eval mode and true float32, its passes are counted; the test images come from whatever holds them.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from puma.data.checks import match_classes
from puma.data.load import as_source
from puma.data.pool import read_batch
from puma.data.source import MapStyle, Source, stratified_rows
from puma.devices import environment
from puma.errors import DataError, ModelError, UsageError, integer
from puma.evaluation import attacks
from puma.evaluation.attacks import Attacker, CountedNetwork, evaluation_mode
from puma.evaluation.result import CLEAN, METADATA_KEY, Evaluation, flag_table, result_path, withstood
from puma.io import Shards, claim_folder, fingerprint, require_same_settings, spans
from puma.models.checks import check_first, check_model, device_of, recorded_logits
from puma.models.networks import config_of
from puma.models.weights import unwrap, weights_sha256
from puma.progress import Progress
from puma.threat import ThreatModel

logger = logging.getLogger("puma")
SCHEMA = "puma.evaluation.shard/1"
TestData = Source | MapStyle | DataLoader[Any] | str | Path
_SQUARE_GAIN = 0.002  # the threshold of AutoAttack's own check, applied to all shards together


def evaluate(
    model: nn.Module,
    dataset: TestData,
    threat: ThreatModel | str,
    *,
    out: Path | str | None = None,
    subset: int | None = None,
    seed: int = 0,
    attack: str = "standard",
    batch_size: int = 256,
    shard_rows: int = 1024,
    worker: int = 0,
    num_workers: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Measure ``model``: clean accuracy on every test image, accuracy under attack on every one or on a subset.

    The model runs in eval mode and float32, on its device, and is left as it was. Called again with the same arguments,
    an unfinished evaluation in ``out`` is resumed, and a finished one is read.

    Args:
        model: maps float images ``[B, C, H, W]`` in [0, 1] to logits; normalises inside.
        dataset: test images: a puma source or the text that opens one, any map-style dataset of
            ``(uint8 [H, W, C], label)``, or a `DataLoader` of one. Classes with names are matched with the model's.
        threat: norm and eps.
        out: folder for ``evaluation.json``, the flags of every image and the shards; see `result_path`.
        subset: attack a stratified sample of this many images only, the same for every model.
        seed: every batch of AutoAttack starts from it.
        attack: ``"standard"`` (AutoAttack), or a weaker one of `puma.evaluation.attacks`.
        batch_size: images attacked together; the attacks' random numbers depend on it.
        shard_rows: images of a shard, the unit of resuming and of sharing among workers.
        worker, num_workers: this process's number and how many share the shards through ``out``; only the last to
            finish returns a ``complete`` evaluation, and writes it.
        progress: show progress.

    Raises:
        UsageError: unknown attack, bad sizes, fewer classes or another image size than AutoAttack standard can take.
        DataError: images or labels that cannot be used.
        ModelError: not float32, NaN logits, or as `puma.models.checks.check_model`.
        ResumeError, StorageError: ``out`` holds an evaluation of something else, or cannot be written.
        CheckError: an attack's images break the threat model, or a second evaluation contradicts it.
    """
    steps = attacks.attack_steps(attack)
    batch_size, shard_rows = integer("batch_size", batch_size, low=1), integer("shard_rows", shard_rows, low=1)
    seed, subset = integer("seed", seed, low=0), None if subset is None else integer("subset", subset, low=1)
    if not 0 <= worker < num_workers:
        raise UsageError(f"worker {worker} of {num_workers} does not exist", fix="numbers run from 0")
    if num_workers > 1 and out is None:
        raise UsageError("several workers need a folder to share", fix="give out=")
    threat = ThreatModel.parse(threat)
    source = open_test_set(dataset, model)
    if attack == "standard" and threat.norm == "L2" and attacks.square_fails(*source.image_shape[:2]):
        what = "AutoAttack standard fails in L2 on images of {} x {} pixels".format(*source.image_shape)
        why = "Square lays a grid of tiles that reaches beyond them"
        raise UsageError(what, why=why, fix='attack="apgd-ce", or another size (?resize=32)')
    rows = attacked_rows(source, subset)
    settings = {
        "model": weights_sha256(model),
        "architecture": config_of(unwrap(model)) or type(unwrap(model)).__qualname__,
        "dataset": source.fingerprint,
        "images": len(source),
        "threat": [threat.norm, threat.eps],
        "attack": attack,
        "steps": list(steps),
        "subset": None if len(rows) == len(source) else len(rows),
        "seed": seed,
        "batch_size": batch_size,
        "shard_rows": shard_rows,
    }
    path = None if out is None else result_path(Path(out), attack, threat)
    images, _ = read_batch(source, np.arange(min(32, batch_size, len(source))), device_of(model))
    with evaluation_mode(model):
        claim: dict[str, Any] = {"schema": SCHEMA, "environment": recorded_logits(model, images)}
    if path is not None and path.is_file():
        try:
            finished = Evaluation.read(path)
        except DataError as error:
            logger.warning("%s; it is put together again from its shards", error.what)
        else:
            require_same_settings(path, finished.meta["settings"], settings)
            claim_folder(path.with_name(f"{path.stem}-shards"), settings, write=False, **claim)
            return finished
    with evaluation_mode(model):  # before anything is written
        classes = _check(model, source, batch_size, gradients=bool(steps))
    shards = None if path is None else Shards(path.with_name(f"{path.stem}-shards"), settings, **claim)
    driver = _Driver(model, source, rows, threat, settings, shards)
    with nullcontext() if shards is None else shards.held(worker, num_workers), evaluation_mode(model):
        try:
            result = driver.run(classes, worker, num_workers, progress)
        except (MemoryError, torch.OutOfMemoryError) as error:
            fix = f"batch_size={batch_size // 2} and another folder: random numbers depend on it"
            raise UsageError(f"not enough memory for batches of {batch_size}", why=str(error), fix=fix) from error
    if path is not None and result.complete:
        result = result.write(path)
    for warning in result.warnings:
        logger.warning("AutoAttack warns (%s): %s. What to do: %s.", warning["flag"], warning["means"], warning["do"])
    return result


class Cost(NamedTuple):
    """Cost of an evaluation at most."""

    images: int  # to attack
    passes: int  # forward passes, if all withstand
    seconds: float  # on one device


def estimate_cost(
    model: nn.Module, dataset: TestData, *, attack: str = "standard", subset: int | None = None, batch_size: int = 256
) -> Cost:
    """Upper bound of the cost of `evaluate`, from the fastest of three forward passes; arguments as there."""
    steps, source = attacks.attack_steps(attack), open_test_set(dataset, model)
    attacked = len(attacked_rows(source, subset)) if steps else 0
    # batches of the attack: a small one costs more an image
    images, _ = read_batch(source, np.arange(min(batch_size, attacked or len(source))), device_of(model))
    with evaluation_mode(model), torch.no_grad():
        targets = attacks.num_targets(attack, _check(model, source, batch_size, gradients=bool(steps)))
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            model(images).sum().item()
            seconds.append(time.perf_counter() - started)
        each = min(seconds) / len(images)
    passes = len(source) + attacked * sum(attacks.full_cost(step, targets) for step in steps)
    return Cost(attacked, passes, passes * each)


# --- the model and the test images ---------------------------------------------------------------------------------


def open_test_set(dataset: TestData, model: nn.Module) -> Source:
    """The test images, with the model's class numbers where both have class names (`DataError` for unknown ones)."""
    if isinstance(dataset, DataLoader):
        if dataset.collate_fn is not default_collate or isinstance(dataset.dataset, IterableDataset):
            what = "the loader makes its batches in a way of its own: what its images are is unknown"
            raise DataError(what, fix="give the dataset itself, of items (image, label), without IterableDataset")
        dataset = cast(MapStyle, dataset.dataset)
    source = as_source(dataset)
    names: Any = getattr(unwrap(model), "class_names", None)
    return match_classes(source, names, "the model") if names else source


def _check(model: nn.Module, source: Source, batch_size: int, *, gradients: bool) -> int:
    """Number of the model's classes; `ModelError` for one whose first images show that it cannot be evaluated."""
    images, _ = read_batch(source, np.arange(min(32, batch_size, len(source))), device_of(model))
    logits = check_model(model, images, int(source.labels.max()) + 1)
    if gradients:
        check_first(model, images)
    _require_finite(logits)
    return logits.shape[1]


def _require_finite(logits: Tensor) -> None:
    if bad := int((~torch.isfinite(logits)).any(1).sum()):
        what = f"the model's logits are NaN or infinite for {bad} of {len(logits)} test images"
        why, fix = "a NaN would count as a wrong class", "check the weights: training may have diverged"
        raise ModelError(what, why=why, fix=fix)


def attacked_rows(source: Source, subset: int | None) -> NDArray[np.int64]:
    """Rows to attack, ascending: all, or a stratified sample of ``subset``, the same for every model."""
    if subset is None or subset == len(source):
        return np.arange(len(source), dtype=np.int64)
    return stratified_rows(source.labels, subset, 0)


# --- one evaluation ------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """Rows of the test set and what the attacks did to them so far."""

    number: int
    rows: NDArray[np.int64]  # of the test set
    broken_by: NDArray[np.object_]  # None: withstands; "clean": misclassified from the start; else the attack
    log: list[dict[str, Any]] = field(default_factory=list)  # one entry for each finished attack
    warnings: Counter[str] = field(default_factory=Counter)


@dataclass
class _Driver:
    """One evaluation."""

    model: nn.Module
    source: Source
    rows: NDArray[np.int64]  # of the test set, to attack
    threat: ThreatModel
    settings: Mapping[str, Any]
    shards: Shards | None  # None: nothing is kept

    def __post_init__(self) -> None:
        self.network, self.labels = CountedNetwork(self.model), self.source.labels
        self.device, self.batch_size = device_of(self.model), int(self.settings["batch_size"])
        self.steps = tuple(self.settings["steps"])
        self.spans = spans(len(self.rows), int(self.settings["shard_rows"])) if self.steps else []

    def run(self, classes: int, worker: int, num_workers: int, show: bool) -> Evaluation:
        """Evaluate clean, attack this worker's shards, and put together all that are finished."""
        attack, clean = str(self.settings["attack"]), self._predict_clean(show)
        targets, numbers = attacks.num_targets(attack, classes), range(len(self.spans))
        self.attacker = Attacker(self.network, self.threat, targets=targets, seed=int(self.settings["seed"]))
        self.costs = [attacks.full_cost(step, targets) for step in self.steps]
        own = [self._open(number, clean) for number in numbers[worker::num_workers]]
        total = sum(int(clean[shard.rows].sum()) for shard in own) * sum(self.costs)
        done = total - sum(self._remaining(shard) for shard in own)
        name = "AutoAttack" if attack == "standard" else attack
        with Progress(name, total, "passes", show=show and bool(self.steps), done=done) as bar:
            self.network.on_pass = bar.advance
            for shard in own:
                self._attack_shard(shard, bar)
            self.network.on_pass = None
        others = [self._open(number, clean) for number in numbers if number % num_workers != worker]
        return self._result(clean, sorted(own + others, key=lambda shard: shard.number))

    def _predict_clean(self, show: bool) -> NDArray[np.bool_]:
        """Which images are classified correctly without attack, bool ``[N]``."""
        correct = np.zeros(len(self.labels), dtype=bool)
        with Progress("clean", len(self.labels), "images", show=show) as bar, torch.no_grad():
            for span in spans(len(self.labels), self.batch_size):
                images, labels = read_batch(self.source, np.asarray(span), self.device)
                logits = self.network(images)
                _require_finite(logits)
                correct[span.start : span.stop] = (logits.argmax(1) == labels).cpu().numpy()
                bar.advance(len(span))
        return correct

    def _open(self, number: int, clean: NDArray[np.bool_]) -> _Shard:
        """Read a shard as it was left; a new one where there is none or it is damaged."""
        rows = self.rows[np.asarray(self.spans[number])]
        if self.shards is None or not self.shards.finished(number):
            return _Shard(number, rows, np.where(clean[rows], np.array(None), CLEAN))
        table = pq.read_table(self.shards.path(number))
        meta = json.loads(table.schema.metadata[METADATA_KEY])
        broken_by = np.array(table["broken_by"].to_pylist(), dtype=object)
        return _Shard(number, rows, broken_by, meta["log"], Counter(meta["warnings"]))

    def _attack_shard(self, shard: _Shard, bar: Progress) -> None:
        """Run the attacks that a shard has not seen; write it after each."""
        if shard.number == 0 and not shard.log:
            images, labels = read_batch(self.source, shard.rows[: self.batch_size], self.device)
            attacks.check_autoattack(CountedNetwork(self.model), images, labels, self.attacker.recorder)
        for step in self.steps[len(shard.log) :]:
            goal = bar.done + self._remaining(shard)
            shard.log.append(self._attack_once(shard, step))
            shard.warnings += self.attacker.recorder
            self.attacker.recorder.clear()
            if self.shards is not None:
                meta = {"schema": SCHEMA, "log": shard.log, "warnings": dict(shard.warnings)}
                table = flag_table(shard.rows, self.labels[shard.rows], shard.broken_by, meta)
                with self.shards.writing(shard.number) as temporary:
                    pq.write_table(table, temporary, write_page_checksum=True)
            # what the broken images would have cost in later attacks counts as done
            note = f"{withstood(shard.broken_by).mean():.1%} robust after {step}"
            note += f" in shard {shard.number}" if shard.number else ""
            bar.advance(goal - self._remaining(shard) - bar.done, note)

    def _attack_once(self, shard: _Shard, step: str) -> dict[str, Any]:
        """Attack the robust images of a shard, mark those that break, and return the entry for the log."""
        started, cost = time.perf_counter(), self.network.cost
        candidates = np.flatnonzero(withstood(shard.broken_by))
        broken = rounding = 0
        for span in spans(len(candidates), self.batch_size) if self.threat.eps else []:
            chosen = candidates[span.start : span.stop]
            images, labels = read_batch(self.source, shard.rows[chosen], self.device)
            adversarial = self.attacker.perturb(step, images, labels, int(shard.rows[chosen[0]]))
            with torch.no_grad():
                wrong = self.network(adversarial).argmax(1) != labels
                fallen = images[wrong], adversarial[wrong], labels[wrong]
                rounding += attacks.confirm(self.network, *fallen, self.threat, step)
            shard.broken_by[chosen[wrong.cpu().numpy()]] = step
            broken += int(wrong.sum())
        counts = {"images": len(candidates), "broken": broken, "broken_within_rounding": rounding}
        spent = {"cost": self.network.cost - cost, "seconds": round(time.perf_counter() - started, 3)}
        return {"attack": step, "shard": shard.number, **counts, **spent}

    def _remaining(self, shard: _Shard) -> int:
        """Cost of the attacks still to come at most."""
        return int(withstood(shard.broken_by).sum()) * sum(self.costs[len(shard.log) :])

    def _result(self, clean: NDArray[np.bool_], shards: Sequence[_Shard]) -> Evaluation:
        finished = [shard for shard in shards if len(shard.log) == len(self.steps)]
        attacked, broken_by = np.zeros(len(clean), dtype=bool), np.where(clean, np.array(None), CLEAN)
        raised = Counter[str]()
        for shard in finished:
            attacked[shard.rows], broken_by[shard.rows] = True, shard.broken_by
            raised += shard.warnings
        if (broken_by == "square").sum() > _SQUARE_GAIN * max(int(attacked.sum()), 1):
            raised["square-gains"] += 1
        meta = {
            "identity": fingerprint(dict(self.settings)),
            "settings": dict(self.settings),
            "environment": environment(self.device) | {"pyautoattack": version("pyautoattack")},
            "log": [entry for shard in finished for entry in shard.log],
            "warnings": attacks.explain(raised),
        }
        given = self.threat, str(self.settings["attack"]), self.labels, attacked, broken_by, meta
        return Evaluation(*given, complete=len(finished) == len(shards))
