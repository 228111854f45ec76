"""One cell of a study: plan, train, evaluate; attack; and its share of mislabelled perturbed images."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from puma.data.pool import Pool
from puma.evaluation import Evaluation, evaluate, mislabelled_share
from puma.margins import MarginTable
from puma.models.weights import load_model
from puma.plan import Plan
from puma.strategies import get_strategy, make_plan
from puma.study.folder import StudyFolder
from puma.study.margins import load_reference
from puma.study.materials import load_pool, load_test, new_network, on_device, study_device
from puma.study.spec import Cell
from puma.training.loop import train
from puma.training.recipe import load_recipe
from puma.training.run import Run


def more_than_margins(cell: Cell) -> bool:
    """Whether the cell's strategy needs scores of a training run, or features."""
    return bool(set(get_strategy(cell.strategy).needs) - {"margin"})


def run_cell(study: StudyFolder, cell: Cell, show: bool) -> dict[str, Any]:
    """Run one cell and return its rows of the results table, one per checkpoint."""
    threat, settings = study.spec.threat_model, study.spec.evaluation
    pool = load_pool(study, cell.synthetic)
    table, params = MarginTable.read(study.margin_folder(cell.synthetic)), dict(cell.params)
    if more_than_margins(cell):
        table = table.join(MarginTable.read(study.scores_folder(cell.synthetic)))
        if "features" in get_strategy(cell.strategy).parameters:
            params["features"] = study.features_folder(cell.synthetic)
    plan = make_plan(
        table,
        strategy=cell.strategy,
        prune_fraction=cell.prune_fraction,
        threat=threat,
        seed=cell.seed,
        **params,
    )
    plan.write(study.plan_file(cell))
    out = study.run_folder(cell)
    network = new_network(study, pool, cell.seed)
    run = train(network, pool, threat=threat, plan=plan, recipe=cell.recipe, out=out, seed=cell.seed, progress=show)
    rows, flags = [], []
    for checkpoint in settings.checkpoints:
        model = on_device(run.model if checkpoint == "last" else run.best)
        if study_device().type == "cpu":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster there
        evaluation = evaluate(
            model,
            load_test(study),
            threat,
            out=out if checkpoint == "last" else out / checkpoint,
            attack=settings.screen or settings.attack,
            subset=settings.screen_subset if settings.screen else settings.subset,
            progress=show,
        )
        rows.append(_row(study, cell, pool, plan, run, checkpoint, evaluation))
        flags.append(_flags(evaluation, checkpoint))
    return {"rows": rows, "flags": flags}


def attack_cell(study: StudyFolder, cell: Cell, show: bool) -> dict[str, Any]:
    """Run ``evaluation.attack`` on a finished cell that has only seen the screening attack."""
    settings, found, flags = study.spec.evaluation, [], []
    run = Run.read(study.run_folder(cell))
    for checkpoint in settings.checkpoints:
        out = study.run_folder(cell)
        model = on_device(run.model if checkpoint == "last" else run.best)
        if study_device().type == "cpu":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        evaluation = evaluate(
            model,
            load_test(study),
            study.spec.threat_model,
            out=out if checkpoint == "last" else out / checkpoint,
            attack=settings.attack,
            subset=settings.subset,
            progress=show,
        )
        accuracies = {name: getattr(evaluation, name) for name in ("robust_accuracy", "apgd_accuracy", "n_test")}
        found.append({"checkpoint": checkpoint, **accuracies})
        flags.append(_flags(evaluation, checkpoint))
    return {"accuracies": found, "flags": flags}


def _flags(evaluation: Evaluation, checkpoint: str) -> dict[str, Any]:
    """The flags of every test image as text, a bit each: what intervals need, without the run's folder."""
    columns = ("clean_correct", "attacked", "robust")
    bits = {name: np.packbits(getattr(evaluation, name)).tobytes().hex() for name in columns}
    return {"checkpoint": checkpoint, "attack": evaluation.attack, "images": evaluation.n_clean, **bits}


def _row(
    study: StudyFolder, cell: Cell, pool: Pool, plan: Plan, run: Run, checkpoint: str, evaluation: Evaluation
) -> dict[str, Any]:
    """One row of ``results.parquet`` (DESIGN: artefacts)."""
    return {
        "study": study.spec.name,
        "pool": " + ".join(f"{source['name']} ({source['rows']})" for source in pool.describe()["sources"]),
        "strategy": cell.strategy,
        "params": json.dumps(dict(cell.params), sort_keys=True),
        "prune_fraction": cell.prune_fraction,
        "seed": cell.seed,
        "recipe": cell.recipe,
        "checkpoint": checkpoint,
        "eps_train": float(plan.eps.max()),
        "clean_accuracy": evaluation.clean_accuracy,
        "robust_accuracy": evaluation.robust_accuracy,
        "apgd_accuracy": evaluation.apgd_accuracy,
        "pgd_accuracy": evaluation.attacked_accuracy if study.spec.evaluation.screen else None,
        "n_test": 0 if study.spec.evaluation.screen else evaluation.n_test,
        "n_pgd": evaluation.n_test if study.spec.evaluation.screen else 0,
        "kept": plan.kept,
        "mean_eps": plan.mean_eps,
        # forward-equivalents: an attack step is a forward and a backward pass
        "attack_cost": 2.0 * load_recipe(cell.recipe).attack_steps * run.meta["draws"] * run.meta["attack_cost"],
        "steps": run.meta["steps"],
    }


def mislabelled_of_cell(study: StudyFolder, cell: Cell, show: bool) -> dict[str, Any]:
    """Share of a cell's kept training images whose perturbation the reference model gives another class."""
    share = mislabelled_share(
        on_device(load_model(study.run_folder(cell))),
        on_device(load_reference(study)),
        load_pool(study, cell.synthetic),
        Plan.read(study.plan_file(cell)),
        study.spec.threat_model,
        sample=study.spec.evaluation.mislabelled,
        seed=cell.seed,
        progress=show,
    )
    return {"share": share}
