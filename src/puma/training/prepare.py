"""Everything that can be wrong with a training, checked before any compute."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from puma.data.pool import Pool
from puma.data.source import Source
from puma.data.tensors import to_tensor
from puma.distribute import Devices
from puma.errors import DataError, ModelError
from puma.models.build import build_model
from puma.plan import Plan
from puma.threat import ThreatModel
from puma.training.batches import Batches
from puma.training.recipe import Recipe
from puma.training.run import Settings
from puma.training.validation import Validation, held_out


@dataclass
class Job:
    """A training that has passed all checks."""

    network: nn.Module
    pool: Pool
    recipe: Recipe
    threat: ThreatModel
    weight: float
    batches: Batches
    validation: Validation | None
    settings: Settings


def prepare(
    model: nn.Module | str,
    pool: Pool | Source,
    threat: ThreatModel,
    plan: Plan | Path | str | None,
    recipe: Recipe,
    seed: int,
    validation: int | Source | None,
    devices: Devices,
) -> Job:
    """Check a training and put its network and data in place; `puma.training.train` explains arguments and errors."""
    whole = pool if isinstance(pool, Pool) else Pool([pool])
    plan = Plan.read(plan) if isinstance(plan, (str, Path)) else plan
    if plan is not None:
        _check_plan(plan, whole, threat)
    keep, eps = (plan.keep.copy(), plan.eps) if plan else _everything(len(whole), threat)
    judge, described = None, "none"
    if validation is None or isinstance(validation, int):
        rows = held_out(whole, recipe.validation_images if validation is None else validation, seed)
        keep[rows] = False
        if len(rows):
            judge = Validation(whole.read(rows), whole.labels[rows], threat, recipe, devices)
            described = f"{len(rows)} held out"
    else:
        _check_validation(validation, whole)
        judge = Validation(validation.read(slice(None)), validation.labels, threat, recipe, devices)
        described = validation.fingerprint
    batches = Batches(
        whole, keep, eps, recipe, threat, seed=seed, device=devices.device, rank=devices.rank, world=devices.world
    )
    network = _network(model, whole, recipe, seed, devices.device)
    weight = recipe.trades_weight if plan is None or plan.trades_weight is None else plan.trades_weight
    values = {
        "network": getattr(network, "config", None) or type(network).__qualname__,
        "threat": str(threat),
        "eps": threat.eps,
        "seed": seed,
        "pool": whole.fingerprint,
        "plan": plan.fingerprint if plan else None,
        "trades_weight": weight,
        "validation": described,
    }
    return Job(network, whole, recipe, threat, weight, batches, judge, Settings(recipe, values))


def optimizer_of(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with the recipe's weight decay, in two groups where batch normalisation is spared."""
    spared = []
    if not recipe.decay_norm_parameters:
        spared = [p for m in network.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)]
    chosen = {id(parameter) for parameter in spared}
    groups = [
        {"params": [p for p in network.parameters() if id(p) not in chosen], "weight_decay": recipe.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.scaled_learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=True,
    )


def _network(model: nn.Module | str, pool: Pool, recipe: Recipe, seed: int, device: torch.device) -> nn.Module:
    height, _, channels = pool.image_shape
    if isinstance(model, str):
        network = build_model(model, pool.num_classes, in_channels=channels, image_size=height, seed=seed)
    else:
        network = copy.deepcopy(model)
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = network.to(device).requires_grad_(True)
    _try(network.eval(), pool, device)
    return network


def _try(network: nn.Module, pool: Pool, device: torch.device) -> None:
    """Show the network two images: a network for other images or classes is refused here, by name."""
    try:
        with torch.no_grad():
            logits = network(to_tensor(pool.read(np.arange(min(2, len(pool)))), device))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{type(network).__name__} does not take images {pool.image_shape}", why=str(error).splitlines()[0]
        ) from error
    classes = logits.shape[1] if logits.ndim == 2 else 0
    if classes <= int(pool.labels.max()) or classes < 2:
        raise DataError(
            f"labels reach {int(pool.labels.max())}, but the network has {classes} logits",
            fix=f"build_model(..., num_classes={pool.num_classes})",
        )


def _check_plan(plan: Plan, pool: Pool, threat: ThreatModel) -> None:
    if len(plan) != len(pool):
        raise DataError(f"the plan has {len(plan):,} rows, the pool {len(pool):,}", fix="plan this pool again")
    planned = plan.meta.get("pool", {}).get("fingerprint")
    if planned != pool.fingerprint:
        raise DataError(
            "the plan was made for another pool",
            why=f"its pool is {str(planned)[:12]}, this one {pool.fingerprint[:12]}",
            fix="score and plan this pool, or train on that one",
        )
    if plan.threat != threat:
        raise DataError(
            f"the plan was made for {plan.threat}, not for {threat}", fix=f"plan again with --threat {threat}"
        )


def _check_validation(source: Source, pool: Pool) -> None:
    if source.image_shape != pool.image_shape or source.num_classes > pool.num_classes:
        raise DataError(
            f"validation images are {source.image_shape} in {source.num_classes} classes",
            why=f"the pool's are {pool.image_shape} in {pool.num_classes}",
        )


def _everything(size: int, threat: ThreatModel) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    return np.ones(size, dtype=np.bool_), np.full(size, threat.eps, dtype=np.float32)
