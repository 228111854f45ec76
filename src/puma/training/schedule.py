"""Learning rate and momentum as pure functions of the step: nothing of a schedule has to be saved."""

from __future__ import annotations

import math

from puma.models.ema import ramped_decay
from puma.training.recipe import Recipe

_LOW, _HIGH = 0.85, 0.95  # what torch's OneCycleLR cycles the momentum between unless told otherwise
_START, _END = 25.0, 1e4  # and its div_factor and final_div_factor


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of optimiser step ``step``, counted from 0."""
    highest = recipe.scaled_learning_rate
    if recipe.schedule == "constant":
        return highest
    if recipe.schedule == "step":
        return highest * 0.1 ** sum(step >= share * recipe.steps for share in recipe.milestones)
    return _one_cycle(recipe, step, highest / _START, highest, highest / _START / _END)


def momentum(recipe: Recipe, step: int) -> float:
    """The momentum of optimiser step ``step``; cycled against the learning rate if the recipe says so."""
    return _one_cycle(recipe, step, _HIGH, _LOW, _HIGH) if recipe.cycle_momentum else recipe.momentum


def ema_decay(recipe: Recipe, step: int) -> float:
    """The decay of the weight average after ``step`` steps, counted from 1; 0 copies the weights."""
    since = step - recipe.ema_warmup * recipe.steps
    if since < 0:
        return 0.0
    return ramped_decay(recipe.ema, since) if recipe.ema_ramp else recipe.ema


def _one_cycle(recipe: Recipe, step: int, start: float, peak: float, end: float) -> float:
    """``torch.optim.lr_scheduler.OneCycleLR`` with cosine annealing, moved every ``schedule_every`` steps."""
    total = math.ceil(recipe.steps / recipe.schedule_every)
    now, turn, last = step // recipe.schedule_every, recipe.warmup * total - 1, total - 1
    if now <= turn and turn > 0:
        return _cosine(start, peak, now / turn)
    return _cosine(peak, end, (now - turn) / (last - turn))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
