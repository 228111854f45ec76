"""Mislabelled perturbed data: the share of perturbed training images that a reference model assigns to another class.

The reference model must not be the one that scored the margins: margin < eps_i alone would be true by construction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from puma.attacks.pgd import Loss, pgd
from puma.data.pool import Pool, read_batch
from puma.errors import DataError, UsageError
from puma.evaluation.driver import evaluation_mode
from puma.models.checks import apply_model, device_of
from puma.plan import Plan
from puma.progress import Progress
from puma.rng import batch_seed, mixed_key, permuted
from puma.threat import ThreatModel


class MislabelledShares(NamedTuple):
    """Shares of the kept training images, in [0, 1], whose perturbed image a reference model gives another class."""

    share: float  # all of them, also those that the reference model gets wrong unperturbed: their label is in doubt
    by_attack: float  # those that it gets right unperturbed: mislabelled by the attack alone


def mislabelled_shares(
    model: nn.Module,
    reference: nn.Module,
    pool: Pool,
    plan: Plan,
    threat: ThreatModel,
    *,
    sample: int | None = None,
    loss: Loss = "kl",
    steps: int = 10,
    batch_size: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> MislabelledShares:
    """Measure them on the perturbed images of training: PGD against the model being trained, at each image's own eps.

    Args:
        model: the model being trained, which is attacked.
        reference: an accurate model that did not score the margins.
        pool, plan: training images; which are kept, and their eps.
        threat: norm and eps that the plan was made for.
        sample: use this many kept images, chosen at random; None uses all.
        loss: of PGD: ``"kl"`` to the clean prediction as in TRADES, or ``"ce"`` with the label as in PGD-AT.
        steps, batch_size: PGD steps, and images attacked together.
        seed: of the sample and of the attack's starts.
        progress: show progress.

    Raises:
        DataError: plan and pool do not belong together, or the plan keeps nothing.
        UsageError: the plan is for another norm, or the sample is empty.
    """
    pool.check_plan(plan)
    if plan.threat.norm != threat.norm:
        raise UsageError(f"the plan is for {plan.threat}, not for {threat}")
    rows = np.flatnonzero(plan.keep)
    if not len(rows):
        raise DataError("the plan keeps no image")
    if sample is not None and sample < 1:
        raise UsageError(f"a sample of {sample} images", fix="1 or more, or None for all")
    if sample is not None and sample < len(rows):
        rows = np.sort(rows[permuted(np.arange(sample), len(rows), mixed_key(seed, 0))])
    device, other = device_of(model), device_of(reference)
    wrong, by_attack = 0, 0
    bar = Progress("perturbed images", len(rows), "images", show=progress)
    with bar, evaluation_mode(model), evaluation_mode(reference):
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            images, labels = read_batch(pool, chosen, device)
            given: dict[str, Any] = {"threat": threat, "eps": torch.from_numpy(plan.eps[chosen]).to(device)}
            generator = torch.Generator(device).manual_seed(batch_seed(seed, start))
            perturbed = pgd(model, images, labels, steps=steps, loss=loss, generator=generator, **given)
            with torch.no_grad():
                clean, attacked = (
                    apply_model(reference, inputs.to(other)).argmax(1).to(device) == labels
                    for inputs in (images, perturbed)
                )
            wrong += int((~attacked).sum())
            by_attack += int((clean & ~attacked).sum())
            bar.advance(len(chosen))
    return MislabelledShares(wrong / len(rows), by_attack / len(rows))
