"""The tasks of a study (synthetic images, margins, other scores, the reference model, runs, attacks) and their cost.

Each reads what earlier ones left in the study's folder, and returns what is recorded in ``done/``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from puma.data.images import shared_copies
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.source import Source
from puma.devices import Devices, resolve_device
from puma.evaluation import Evaluation, estimate_cost, evaluate, mislabelled_shares
from puma.generation import SamplerConfig, diffusion_config, generate, measure
from puma.generation.sampling import estimate_cost as sampling_cost
from puma.io import write_json
from puma.margins import MarginTable, Status
from puma.models.networks import build_model
from puma.models.weights import load_model
from puma.plan import Plan
from puma.scoring import score_margins
from puma.scoring.job import estimate
from puma.scoring.score import ScoringSettings
from puma.scoring.snapshots import SnapshotSettings, embed, load_snapshots, score_run
from puma.strategies import get_strategy, make_plan, regime
from puma.study.folder import StudyFolder
from puma.study.spec import RunSpec
from puma.training.loop import prepare, train
from puma.training.recipe import load_recipe
from puma.training.run import Run

_REFERENCE_SEED = 2000
SNAPSHOTS = 10


@dataclass(frozen=True)
class Task:
    """One task: its name (also in ``done/``), the label shown, the tasks it needs, and a rough share of the time.

    ``work`` takes ``show`` (progress) and returns what is recorded; ``leaves`` is what later tasks read besides.
    """

    name: str
    label: str
    needs: tuple[str, ...]
    weight: float
    work: Callable[[bool], dict[str, Any]]
    leaves: Path | None = None


def study_tasks(study: StudyFolder) -> list[Task]:
    """All tasks of a study, in the order in which they are best begun."""
    spec, made = study.spec, study.synthetic_file if isinstance(study.spec.pool.synthetic, int) else None
    tasks = [Task("synthetic", "synthetic images", (), 1.0, partial(make_synthetic, study), made)]
    for size in dict.fromkeys([None, *(run.synthetic for run in spec.runs())]):
        label, end = ("", "") if size is None else (f" ({size} synthetic)", f"-n{size}")
        work, folder = partial(score_pool, study, size), study.pool_folder(size)
        tasks.append(Task(f"margins{end}", f"margins{label}", ("synthetic",), 1.0, work, folder / "margins"))
        if any(run.synthetic == size and run.needs_snapshots for run in spec.runs()):
            work, needs = partial(score_snapshots, study, size), (f"margins{end}",)
            tasks.append(Task(f"scores{end}", f"other scores{label}", needs, 0.3, work, folder / "scores"))
    if spec.evaluation.mislabelled:
        work = partial(train_reference, study)
        tasks.append(Task("reference", "reference model", ("synthetic",), 0.7, work, study.path / "reference"))
    attacked = set(spec.runs(attacked=True)) if spec.evaluation.screen else set()
    for run in spec.runs():
        end = "" if run.synthetic is None else f"-n{run.synthetic}"
        needs, work = (f"{'scores' if run.needs_snapshots else 'margins'}{end}",), partial(run_one, study, run)
        tasks.append(Task(run.key, run.label, needs, 1.0, work, study.run_folder(run)))
        if run in attacked:
            work = partial(attack_one, study, run)
            tasks.append(Task(f"attack-{run.key}", f"{run.label}, attack", (run.key,), 1.0, work))
        if spec.evaluation.mislabelled:
            work, label = partial(mislabelled_of, study, run), f"{run.label}, mislabelled"
            tasks.append(Task(f"mislabelled-{run.key}", label, (run.key, "reference"), 0.05, work))
    return tasks


def make_synthetic(study: StudyFolder, show: bool) -> dict[str, Any]:
    """Generate the study's synthetic images, if it makes its own, and measure their quality."""
    pool = study.spec.pool
    if not isinstance(pool.synthetic, int):
        return {}
    real, test = _open(pool.real), _open(pool.test)
    config = diffusion_config(real.image_shape, **pool.diffusion)
    device = resolve_device("auto")
    generate(real, pool.synthetic, out=study.synthetic_file, config=config, seed=0, device=device, progress=show)
    quality = measure(real, test, _open(study.synthetic_file))
    write_json(study.path / "synthetic" / "quality.json", quality)
    return {"quality": quality}


def score_pool(study: StudyFolder, synthetic: int | None, show: bool) -> dict[str, Any]:
    """Train the margin models on a pool (one per fold, or several) and measure the margin of every image in it."""
    settings, folder, pool = study.spec.margins, study.pool_folder(synthetic), load_pool(study, synthetic)
    threat, fold = study.spec.threat_model, split_folds(pool, settings.folds)
    count = settings.folds * settings.models
    tables, scores = [], []
    for number in range(count):
        unseen = fold == number % settings.folds if settings.folds > 1 else np.zeros(len(pool), dtype=bool)
        label, run = f"margin model {number + 1} of {count}", folder / f"margin-model-{number}"
        model = _train_full(study, pool, ~unseen, run, settings.seed + number, label, show)
        out = folder / ("margins" if count == 1 else f"margins-fold-{number}")
        model = model.to(resolve_device("auto"))
        tables.append(score_margins(model, pool, norm=threat.norm, mode=settings.mode, out=out, progress=show))
        scores.append(unseen | pool.synthetic if settings.folds > 1 else ~unseen)
    table = tables[0]
    if count > 1:
        table = average(tables, np.stack(scores), "cross_fitted" if settings.folds > 1 else "ensemble")
        table.write(folder / "margins")
    prints = {"pool": pool.fingerprint, "table": table.fingerprint}
    return {"images": len(pool), "regime": regime(table, threat), "fingerprints": prints}


def score_snapshots(study: StudyFolder, synthetic: int | None, show: bool) -> dict[str, Any]:
    """Compute the scores that need a training run, and the features, from the first margin model's snapshots."""
    folder, pool = study.pool_folder(synthetic), load_pool(study, synthetic)
    run, device = folder / "margin-model-0", resolve_device("auto")
    score_run(run, pool, out=folder / "scores", threat=study.spec.threat_model, device=device, progress=show)
    embed(load_snapshots(run)[-1].to(device), pool, folder / "features", progress=show)
    return {}


def train_reference(study: StudyFolder, show: bool) -> dict[str, Any]:
    """Train the reference model for mislabelled perturbations: the study's recipe on everything, with its own seed."""
    pool, out = load_pool(study, None), study.path / "reference"
    _train_full(study, pool, np.ones(len(pool), dtype=bool), out, _REFERENCE_SEED, "reference model", show)
    return {}


def run_one(study: StudyFolder, spec: RunSpec, show: bool) -> dict[str, Any]:
    """Make the plan of a run, train on it, and evaluate it: ``rows`` and ``flags``, one entry per checkpoint."""
    threat = study.spec.threat_model
    pool, folder, params = load_pool(study, spec.synthetic), study.pool_folder(spec.synthetic), dict(spec.params)
    table = MarginTable.read(folder / "margins")
    if spec.needs_snapshots:
        table = table.join(MarginTable.read(folder / "scores"))
        if "features" in get_strategy(spec.strategy).parameters:
            params["features"] = folder / "features"
    plan = make_plan(table, spec.strategy, spec.prune_fraction, threat=threat, seed=spec.seed, **params)
    plan.write(study.plan_file(spec))
    network, out = new_network(study, pool, spec.seed), study.run_folder(spec)
    run = train(network, pool, threat=threat, plan=plan, recipe=spec.recipe, out=out, seed=spec.seed, progress=show)
    screened = study.spec.evaluation.screen is not None
    results = _evaluate(study, spec, run, show, screen=screened)
    facts = {
        "study": study.spec.name,
        "pool": " + ".join(f"{source['name']} ({source['rows']})" for source in pool.describe()["sources"]),
        "strategy": spec.strategy,
        "params": json.dumps(dict(spec.params), sort_keys=True),
        "prune_fraction": spec.prune_fraction,
        "seed": spec.seed,
        "recipe": spec.recipe,
        "eps_train": float(plan.eps.max()),
        "kept": plan.kept,
        "mean_eps": plan.mean_eps,
        # forward-equivalents: an attack step is a forward and a backward pass
        "attack_cost": 2.0 * load_recipe(spec.recipe).attack_steps * run.meta["draws"],
        "steps": run.meta["steps"],
    }
    rows = []
    for checkpoint, result in results.items():
        row = facts | {"checkpoint": checkpoint, "pgd_accuracy": result.attacked_accuracy if screened else None}
        row |= {name: getattr(result, name) for name in ("clean_accuracy", "robust_accuracy", "apgd_accuracy")}
        rows.append(row | {"n_test": 0 if screened else result.n_test, "n_pgd": result.n_test if screened else 0})
    return {"rows": rows, "flags": [_flags(name, result) for name, result in results.items()]}


def attack_one(study: StudyFolder, spec: RunSpec, show: bool) -> dict[str, Any]:
    """Run ``evaluation.attack`` on a finished run that was only given the screening attack."""
    results = _evaluate(study, spec, Run.read(study.run_folder(spec)), show)
    names = ("robust_accuracy", "apgd_accuracy", "n_test")
    rows = [{"checkpoint": at} | {name: getattr(result, name) for name in names} for at, result in results.items()]
    return {"accuracies": rows, "flags": [_flags(at, result) for at, result in results.items()]}


def mislabelled_of(study: StudyFolder, spec: RunSpec, show: bool) -> dict[str, Any]:
    """Shares of a run's kept training images whose perturbation the reference model gives another class."""
    paths, device = (study.run_folder(spec), study.path / "reference"), resolve_device("auto")
    model, reference = (load_model(path).to(device) for path in paths)
    pool, plan = load_pool(study, spec.synthetic), Plan.read(study.plan_file(spec))
    options: dict[str, Any] = {"sample": study.spec.evaluation.mislabelled, "seed": spec.seed, "progress": show}
    return mislabelled_shares(model, reference, pool, plan, study.spec.threat_model, **options)._asdict()


def _open(spec: str | Path | list[str], **options: Any) -> Source:
    """A source whose images, where they have to be decoded, are decoded once for all processes of all studies."""
    with shared_copies():
        return load_dataset(spec, **options)


def load_pool(study: StudyFolder, synthetic: int | None) -> Pool:
    """The pool of the study, or one with a stratified subset of ``synthetic`` of its synthetic images."""
    pool = study.spec.pool
    specs = [str(study.synthetic_file)] if isinstance(pool.synthetic, int) else list(pool.synthetic)
    sources = [_open(pool.real)]
    if synthetic is None:
        sources += [_open(spec) for spec in specs]
    elif synthetic:
        sources.append(_open(specs, subset=synthetic, seed=0))
    return Pool(sources)


def split_folds(pool: Pool, folds: int) -> NDArray[np.int64]:
    """Which margin model does not see a real image, int64 ``[N]``, in equal shares of each class; -1: synthetic."""
    fold = np.full(len(pool), -1, dtype=np.int64)
    rng = np.random.default_rng(0)
    for label in range(pool.num_classes):
        rows = np.flatnonzero(~pool.synthetic & (pool.labels == label))
        fold[rng.permutation(rows)] = np.arange(len(rows)) % folds
    return fold


def average(tables: list[MarginTable], scores: NDArray[np.bool_], kind: str) -> MarginTable:
    """One table from those of K margin models: each image takes the mean margin of the models that score it.

    ``scores``: bool ``[K, N]``, which models score which image. One that they could not all measure takes the first
    one's row as it is. ``kind``: the name under which ``meta["model"]`` lists all K models.
    """
    stacked = np.stack([table.margin for table in tables])
    first, rows = scores.argmax(axis=0), np.arange(scores.shape[1])
    columns: dict[str, Any] = {
        name: np.stack([getattr(table, name) for table in tables])[first, rows]
        for name in ("predicted", "margin", "status", "steps")
    }
    shared: NDArray[np.bool_] = (scores.sum(axis=0) > 1) & np.all(np.isfinite(stacked) | ~scores, axis=0)
    mean = np.where(scores, stacked, 0)[:, shared].sum(axis=0, dtype=np.float64) / scores[:, shared].sum(axis=0)
    estimated = np.any(np.stack([table.status == Status.ESTIMATED for table in tables]) & scores, axis=0)[shared]
    right = np.where(estimated, Status.ESTIMATED, Status.CROSSED)
    columns["margin"][shared] = mean
    columns["status"][shared] = np.where(mean < 0, Status.MISCLASSIFIED, right)
    meta = {**tables[0].meta, "model": {kind: [table.meta["model"] for table in tables]}}
    return replace(tables[0], meta=meta, **columns)


def _train_full(
    study: StudyFolder, pool: Pool, keep: NDArray[np.bool_], out: Path, seed: int, label: str, show: bool
) -> nn.Module:
    """Train on the kept rows of a pool at full eps, with the study's recipe."""
    threat = study.spec.threat_model
    eps = np.where(keep, np.float32(threat.eps), np.float32(0))
    plan = Plan(keep=keep, eps=eps, meta={"strategy": label, "threat": asdict(threat), "pool": pool.describe()})
    recipe = load_recipe(study.spec.recipe).model_copy(update={"snapshots": SNAPSHOTS})
    network = new_network(study, pool, seed)
    return train(network, pool, threat=threat, plan=plan, recipe=recipe, out=out, seed=seed, progress=show).model


def new_network(study: StudyFolder, pool: Pool, seed: int) -> nn.Module:
    """The study's network, untrained."""
    network, (size, _, channels) = study.spec.network, pool.image_shape
    shape: dict[str, Any] = {"in_channels": channels, "image_size": size, **network.options}
    return build_model(network.name, pool.num_classes, seed=seed, **shape)


def _evaluate(study: StudyFolder, spec: RunSpec, run: Run, show: bool, screen: bool = False) -> dict[str, Evaluation]:
    settings, threat, test = study.spec.evaluation, study.spec.threat_model, _open(study.spec.pool.test)
    attack, subset = (settings.screen, settings.screen_subset) if screen else (settings.attack, settings.subset)
    results: dict[str, Evaluation] = {}
    for checkpoint in settings.checkpoints:
        model = (run.model if checkpoint == "last" else run.best).to(resolve_device("auto"))
        if resolve_device("auto").type == "cpu":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster there
        out = study.run_folder(spec) / ("" if checkpoint == "last" else checkpoint)
        results[checkpoint] = evaluate(model, test, threat, out=out, attack=str(attack), subset=subset, progress=show)
    return results


def _flags(checkpoint: str, result: Evaluation) -> dict[str, Any]:
    """Flags of every test image as text, one bit each: intervals need them, and the run's folder may stay elsewhere."""
    names = ("clean_correct", "attacked", "robust")
    bits = {name: np.packbits(getattr(result, name)).tobytes().hex() for name in names}
    return {"checkpoint": checkpoint, "attack": result.attack, "images": result.n_clean, **bits}


def study_cost(study: StudyFolder) -> tuple[list[tuple[str, int, int, float, bool]], int]:
    """The cost of each kind of task, and bytes of memory of one training; nothing is written.

    A kind: its name, how many tasks, how many are finished, seconds of each, and whether these are recorded in the
    folder, else measured on a few steps, batches and images.
    """
    spec, device, recipe = study.spec, resolve_device("auto"), load_recipe(study.spec.recipe)
    real, test, settings = load_dataset(spec.pool.real), load_dataset(spec.pool.test), spec.evaluation
    to_make = spec.pool.synthetic if isinstance(spec.pool.synthetic, int) and not study.synthetic_file.exists() else 0
    pool = Pool([real]) if to_make else load_pool(study, None)
    network, devices, images = new_network(study, pool, 0), Devices(recipe.precision, "auto"), len(pool) + to_make
    cost = prepare(network, pool, spec.threat_model, None, recipe, 0, 0, devices).estimate()
    network, training = network.to(device), cost.step_seconds * recipe.steps
    per_image = training / recipe.steps / recipe.batch_size

    def generated() -> float:
        config = diffusion_config(real.image_shape, **spec.pool.diffusion)
        return sum(sampling_cost(real, to_make, config, SamplerConfig(), device)[1:]) if to_make else 0.0

    def scored(models: list[nn.Module], settings: ScoringSettings | SnapshotSettings) -> float:
        return images / estimate(models, pool, settings).images_per_s

    def margins() -> float:
        scoring = ScoringSettings.sized(device, norm=spec.threat_model.norm, mode=spec.margins.mode)
        return spec.margins.folds * spec.margins.models * (training + scored([network], scoring))

    def attacked(screen: bool) -> float:
        attack, subset = (settings.screen, settings.screen_subset) if screen else (settings.attack, settings.subset)
        return len(settings.checkpoints) * estimate_cost(network, test, attack=str(attack), subset=subset).seconds

    def trained() -> float:
        recipes = [load_recipe(run.recipe) for run in spec.runs()]
        return fmean(one.steps * one.batch_size for one in recipes) * per_image

    kinds: dict[str, tuple[str, Callable[[], float]]] = {
        "synthetic": ("synthetic images", generated),
        "margins": ("margin models and margins", margins),
        "scores": ("other scores", lambda: scored([network] * SNAPSHOTS, SnapshotSettings(spec.threat_model))),
        "reference": ("reference model", lambda: training),
        "run": ("runs", lambda: trained() + attacked(settings.screen is not None)),
        "attack": ("attacks", lambda: attacked(False)),
        "mislabelled": ("mislabelled perturbations", lambda: settings.mislabelled * per_image),
    }
    groups: dict[str, list[float | None]] = {}
    for task in study_tasks(study):
        kind, result = task.name.partition("-")[0], study.result(task.name)
        seconds = None if result is None else float(result["seconds"])
        groups.setdefault(kind if kind in kinds else "run", []).append(seconds)
    costs = []
    for kind, recorded in groups.items():
        known, (words, measured) = [one for one in recorded if one is not None], kinds[kind]
        each = fmean(known) if known else measured()
        costs.append((words, len(recorded), len(known), each, bool(known)))
    return costs, cost.memory
