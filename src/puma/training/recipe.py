"""Recipes: everything that training depends on besides data, plan, threat model and seed, frozen and validated.

A recipe is a TOML file. Quirks of the published code that a re-implementation easily loses are fields of their own.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from puma.errors import UsageError, unknown
from puma.io import parse_toml

_FOLDER = files("puma.training") / "recipes"
_DROPPED: dict[str, Any] = {  # fields of recipes written by earlier versions, with the one value still understood
    "smooth_both_terms": False, "detach_clean": False, "awp_warmup": 0, "cutmix": False, "ema_batchnorm": "copy",
    "learning_rate_scaling": "none", "attack_schedule": "fixed",
}  # fmt: skip


class Recipe(BaseModel):
    """Settings of one adversarial training; see `load_recipe`. Lengths are optimiser steps, never epochs."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="Short name.", pattern=r"^[\w.+-]{1,80}$")
    source: str = Field("", description="Where the settings come from.")

    objective: Literal["trades", "pgd-at", "mart"] = Field("trades", description="Loss (puma.losses).")
    beta: float = Field(5.0, ge=0, description="Weight of trades' and mart's adversarial term; a plan may override it.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of each label spread over all classes.")
    awp: float = Field(0.0, ge=0, description="Relative adversarial weight perturbation (arXiv 2004.05884); 0 off.")

    steps: int = Field(gt=0, description="Optimiser steps, whatever the size of the pool.")
    batch_size: int = Field(gt=0, description="Images a step, over all devices.")
    micro_batch: int | None = Field(None, gt=0, description="Images of one forward pass; unset: what fits into memory.")
    synthetic_share: float | None = Field(0.7, ge=0, le=1, description="Share of synthetic images in a batch, if any.")
    crop: int = Field(0, ge=0, description="Random crop after this many pixels of zero padding; 0 off.")
    flip: bool = Field(False, description="Random horizontal flip.")

    learning_rate: float = Field(gt=0, description="Highest learning rate, whatever the batch size.")
    schedule: Literal["one-cycle", "step", "constant"] = Field("one-cycle", description="Course of the learning rate.")
    schedule_every: int = Field(1, gt=0, description="Quirk: steps between changes of the rate; published: an epoch.")
    warmup: float = Field(0.025, gt=0, lt=1, description="one-cycle: share of the steps in which the rate rises.")
    milestones: tuple[float, ...] = Field((), description="step: shares of the steps at which the rate falls tenfold.")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum, unless it is cycled.")
    cycle_momentum: bool = Field(False, description="Quirk: OneCycleLR's momentum, from 0.95 to 0.85 and back.")
    nesterov: bool = Field(True, description="Nesterov momentum.")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty of SGD.")
    decay_norm_parameters: bool = Field(True, description="Quirk: false spares batch-norm parameters, as published.")
    clip_gradient: float | None = Field(None, gt=0, description="Largest norm of the gradient; unset: no clipping.")

    ema: float = Field(0.995, ge=0, lt=1, description="Decay of the weight average at each step; 0: no average.")
    ema_warmup: float = Field(0.0, ge=0, lt=1, description="Quirk: share of the steps in which the average is a copy.")
    ema_ramp: bool = Field(True, description="Quirk: then decay = min(ema, (1 + d) / (10 + d)) with d steps since.")
    batchnorm_momentum: float | None = Field(
        None, gt=0, le=1, description="Weight of the newest batch; unset: unchanged."
    )
    batchnorm_first_step: bool = Field(False, description="Quirk: that weight is 1 in the first step.")

    attack_steps: int = Field(10, ge=0, description="PGD steps.")
    attack_step_linf: float = Field(0.25, gt=0, description="Step in Linf, as a share of the image's eps.")
    attack_step_l2: float = Field(0.2, gt=0, description="Step in L2, as a share of the image's eps.")
    attack_start_linf: Literal["uniform", "gaussian", "none"] = Field("uniform", description="Start in Linf.")
    attack_start_l2: Literal["uniform", "gaussian", "none"] = Field("gaussian", description="Start in L2.")
    attack_batchnorm: Literal["train", "eval"] = Field(
        "train", description="Quirk: statistics it sees: the batch's, or running."
    )

    validation_images: int = Field(0, ge=0, description="Stratified real images held out for the best checkpoint.")
    validation_every: int | None = Field(None, gt=0, description="Steps between validations; unset: ten in a run.")
    validation_steps: int = Field(40, gt=0, description="PGD steps with the CW loss in validation.")
    log_every: int | None = Field(None, gt=0, description="Steps between metrics rows; unset: steps / 20, at most 50.")
    checkpoint_every: int | None = Field(None, gt=0, description="Steps between checkpoints; unset: ten in a run.")
    snapshots: int = Field(0, ge=0, description="Averaged networks kept, evenly spaced, for puma score-run.")

    precision: Literal["float32", "bf16"] = Field("float32", description="bf16: autocast of all forward passes.")
    channels_last: bool = Field(False, description="Memory format of networks and images.")
    compile: bool = Field(False, description="torch.compile of the network.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        rising = list(self.milestones) == sorted({*self.milestones}) and all(0 < at < 1 for at in self.milestones)
        found = {
            'schedule "step" needs milestones': self.schedule == "step" and not self.milestones,
            'milestones belong to schedule "step"': self.schedule != "step" and bool(self.milestones),
            "milestones are rising shares between 0 and 1": not rising,
            'cycle_momentum needs schedule "one-cycle"': self.cycle_momentum and self.schedule != "one-cycle",
            "nesterov needs momentum": self.nesterov and not self.momentum,
            "mart has no label smoothing": self.objective == "mart" and self.label_smoothing > 0,
            "batchnorm_first_step needs batchnorm_momentum": self.batchnorm_first_step and not self.batchnorm_momentum,
        }
        if any(found.values()):
            raise ValueError("; ".join(problem for problem, present in found.items() if present))
        return self

    @property
    def log_interval(self) -> int:
        """Steps between rows of metrics.csv."""
        return self.log_every or max(min(self.steps // 20, 50), 1)

    def attack(self, norm: str) -> tuple[float, str]:
        """Step (a share of eps) and start of the attack in a norm."""
        linf, l2 = (self.attack_step_linf, self.attack_start_linf), (self.attack_step_l2, self.attack_start_l2)
        return linf if norm == "Linf" else l2

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed, checked again (`UsageError` with all problems at once)."""
        return parse_recipe(self.model_dump(exclude_unset=True) | changes, self.name)

    def to_toml(self, *, documented: bool = False) -> str:
        """The recipe as TOML: every field that is set, with its description as a comment if ``documented``."""
        lines = []
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            comment = f"  # {field.description}" if documented else ""
            lines.append(f"# {key} is unset{comment}" if value is None else f"{key} = {json.dumps(value)}{comment}")
        return "\n".join(lines) + "\n"


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def load_recipe(recipe: str | Path | Recipe, **changes: Any) -> Recipe:
    """Read a packaged recipe by name, or a TOML file; a `Recipe` is taken as it is. ``changes`` are of its fields.

    `UsageError`: no such recipe; it is not TOML; all problems with its fields, at once.
    """
    if isinstance(recipe, Recipe):
        return recipe.replace(**changes) if changes else recipe
    path = Path(recipe)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            fix = "run the command from the folder that the path begins in"
            raise UsageError(f"recipe {path} does not exist", why=f"it is looked for from {Path.cwd()}", fix=fix)
        text = path.read_text("utf-8", errors="replace")
    elif str(recipe) in recipe_names():
        text = (_FOLDER / f"{recipe}.toml").read_text()
    else:
        raise unknown("recipe", str(recipe), recipe_names())
    return parse_recipe(parse_toml(text, f"recipe {recipe}") | changes, str(recipe))


def parse_changes(pairs: Iterable[str], option: str = "--set", example: str = "steps=1000") -> dict[str, Any]:
    """``["steps=100", "flip=true"]`` as a table; values are TOML, and text where they are not."""
    changes: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UsageError(f"{option} {pair!r} is not NAME=VALUE", fix=f"{option} {example}")
        if key in changes:
            raise UsageError(f"{option} {key} is given twice")
        changes[key] = value
        with suppress(UsageError):
            changes[key] = parse_toml(f"value = {value}", f"{option} {key}")["value"]
    return changes


def parse_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Check settings; `UsageError` names all problems at once."""
    values = {key: value for key, value in values.items() if key not in _DROPPED or value != _DROPPED[key]}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            place = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                near = difflib.get_close_matches(place, Recipe.model_fields, n=1)
                problems.append(f"unknown field {place}" + (f" (did you mean {near[0]}?)" if near else ""))
            else:
                problems.append(f"{place}: {problem['msg']}" if place else problem["msg"].removeprefix("Value error, "))
        fix = "`puma recipe show trades-edm` explains every field"
        raise UsageError(f"recipe {origin!r} cannot be used", why="; ".join(problems), fix=fix) from None
