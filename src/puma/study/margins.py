"""The margin models of a study, the margins of its pools, and the reference model, which scores nothing."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from puma.data.pool import Pool
from puma.margins import MarginTable, Status
from puma.models.weights import load_model
from puma.plan import Plan
from puma.scoring import score_margins
from puma.scoring.embed import embed
from puma.scoring.snapshots import load_snapshots, score_run
from puma.strategies.counts import regime
from puma.study.folder import StudyFolder
from puma.study.materials import load_pool, new_network, on_device, study_device
from puma.training.loop import train
from puma.training.recipe import load_recipe

_REFERENCE_SEED = 2000
_SNAPSHOTS = 10


def score_pool(study: StudyFolder, synthetic: int | None, show: bool) -> dict[str, Any]:
    """Train the margin models on a pool (one per fold, or several) and measure the margin of every image in it."""
    settings, folder, pool = study.spec.margins, study.pool_folder(synthetic), load_pool(study, synthetic)
    fold = split_folds(pool, settings.folds)
    count = settings.folds * settings.models
    tables, scores = [], []
    for number in range(count):
        unseen = fold == number % settings.folds if settings.folds > 1 else np.zeros(len(pool), dtype=bool)
        seed, label = settings.seed + number, f"margin model {number + 1} of {count}"
        model = _train(study, pool, ~unseen, folder / f"margin-model-{number}", seed, label, show)
        out = folder / ("margins" if count == 1 else f"margins-fold-{number}")
        norm = study.spec.threat_model.norm
        tables.append(score_margins(on_device(model), pool, norm=norm, mode=settings.mode, out=out, progress=show))
        scores.append(unseen | pool.synthetic if settings.folds > 1 else ~unseen)
    whole = tables[0]
    if count > 1:
        kind = "cross_fitted" if settings.folds > 1 else "ensemble"
        whole = average(tables, np.stack(scores), kind)
        whole.write(folder / "margins")
    known = tables[0].margin[np.isfinite(tables[0].margin)]
    wrong = float((known < 0).mean()) if len(known) else None
    prints = {"pool": pool.fingerprint, "table": whole.fingerprint}
    return {
        "images": len(pool),
        "misclassified": wrong,
        "regime": regime(whole, study.spec.threat_model),
        "fingerprints": prints,
    }


def score_run_of(study: StudyFolder, synthetic: int | None, show: bool) -> dict[str, Any]:
    """Compute the scores that need a training run, and the features, from the first margin model's snapshots."""
    folder, pool = study.pool_folder(synthetic), load_pool(study, synthetic)
    run = folder / "margin-model-0"
    threat, device = study.spec.threat_model, study_device()
    score_run(run, pool, out=study.scores_folder(synthetic), threat=threat, device=device, progress=show)
    embed(on_device(load_snapshots(run)[-1]), pool, study.features_folder(synthetic), progress=show)
    return {}


def split_folds(pool: Pool, folds: int) -> NDArray[np.int64]:
    """Which margin model does not see a real image: 0 to folds-1, in equal shares of each class; -1 for synthetic.

    Args:
        pool: the pool.
        folds: how many margin models there are.

    Returns:
        int64 ``[N]``.
    """
    fold = np.full(len(pool), -1, dtype=np.int64)
    rng = np.random.default_rng(0)
    for label in range(pool.num_classes):
        rows = np.flatnonzero(~pool.synthetic & (pool.labels == label))
        fold[rng.permutation(rows)] = np.arange(len(rows)) % folds
    return fold


def average(tables: list[MarginTable], scores: NDArray[np.bool_], kind: str) -> MarginTable:
    """One table from those of K margin models: each image takes the mean margin of the models that score it.

    Cross-fitted, no real image is scored by a model that trained on it; averaging lowers the margin model's error.

    Args:
        tables: one per margin model, of the same pool.
        scores: bool ``[K, N]``, which models score which image; at least one each. An image that one of them could not
            measure takes the first one's row as it is.
        kind: ``"cross_fitted"`` or ``"ensemble"``, the name under which ``meta["model"]`` lists all K models.
    """
    stacked = np.stack([table.margin for table in tables])
    first, rows = scores.argmax(axis=0), np.arange(scores.shape[1])
    columns: dict[str, NDArray[Any]] = {
        name: np.stack([getattr(table, name) for table in tables])[first, rows]
        for name in ("predicted", "margin", "status", "steps")
    }
    shared: NDArray[np.bool_] = (scores.sum(axis=0) > 1) & np.all(np.isfinite(stacked) | ~scores, axis=0)
    mean = np.where(scores, stacked, 0)[:, shared].sum(axis=0, dtype=np.float64) / scores[:, shared].sum(axis=0)
    estimated = np.any(np.stack([table.status == Status.ESTIMATED for table in tables]) & scores, axis=0)[shared]
    columns["margin"][shared] = mean
    columns["status"][shared] = np.where(
        mean < 0, Status.MISCLASSIFIED, np.where(estimated, Status.ESTIMATED, Status.CROSSED)
    )
    meta = {**tables[0].meta, "model": {kind: [table.meta["model"] for table in tables]}}
    return replace(
        tables[0],
        predicted=columns["predicted"],
        margin=columns["margin"],
        status=columns["status"],
        steps=columns["steps"],
        meta=meta,
    )


def train_reference(study: StudyFolder, show: bool) -> dict[str, Any]:
    """Train the reference model for mislabelled perturbations: the study's recipe on everything, with its own seed."""
    pool = load_pool(study, None)
    _train(
        study, pool, np.ones(len(pool), dtype=bool), study.path / "reference", _REFERENCE_SEED, "reference model", show
    )
    return {}


def load_reference(study: StudyFolder) -> nn.Module:
    """The reference model as trained by `train_reference`."""
    return load_model(study.path / "reference")


def _train(
    study: StudyFolder, pool: Pool, keep: NDArray[np.bool_], out: Path, seed: int, label: str, show: bool
) -> nn.Module:
    """Train on the kept rows of a pool at full eps, with the study's recipe."""
    threat = study.spec.threat_model
    eps = np.where(keep, np.float32(threat.eps), np.float32(0))
    plan = Plan(keep=keep, eps=eps, meta={"strategy": label, "threat": asdict(threat), "pool": pool.describe()})
    network = new_network(study, pool, seed)
    recipe = load_recipe(study.spec.recipe).model_copy(update={"snapshots": _SNAPSHOTS})
    run = train(network, pool, threat=threat, plan=plan, recipe=recipe, out=out, seed=seed, progress=show)
    return run.model
