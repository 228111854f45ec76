"""The folder of a run: what it was made with, whether it is finished, and its models."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puma._version import __version__
from puma.distribute import Devices, processor
from puma.errors import ModelError, ResumeError
from puma.io import prepare_folder, read_json, write_json, write_text
from puma.models.weights import SCHEMA as MODEL_SCHEMA
from puma.models.weights import load_model, load_tensors, load_weights
from puma.training.metrics import read_metrics
from puma.training.recipe import Recipe

SCHEMA = "puma.run/1"


@dataclass
class Run:
    """A finished training.

    Args:
        model: the averaged (EMA) network after the last step, in eval mode.
        best: the averaged network of the best checkpoint, chosen on validation images; without validation, `model`.
        folder: where it was written, or None.
        metrics: rows of ``metrics.csv``.
        meta: ``steps``, ``draws`` (images drawn), ``unique_images``, ``best_step``, ``best_validation`` (robust
            accuracy under PGD with the CW loss, or None), ``trained_on`` (rows that could be drawn),
            ``validation_images``, ``attack_cost`` (gradients of the attack, as a share of ``attack_steps`` for
            every image), ``seconds``.
    """

    model: nn.Module
    best: nn.Module
    folder: Path | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path | str, like: nn.Module | None = None) -> Run:
        """Read a finished run from its folder.

        Args:
            folder: the run's folder.
            like: a network of the same architecture, where PUMA did not build it.

        Raises:
            ModelError: it is not finished, or a file is damaged.
        """
        folder = Path(folder)
        if not (folder / "last.safetensors").is_file():
            raise ModelError(f"{folder} is not a finished run", fix="run the same training again: it goes on")
        _, meta = load_tensors(folder / "last.safetensors", MODEL_SCHEMA)
        models = [_read_model(folder / f"{which}.safetensors", like) for which in ("last", "best")]
        return cls(models[0], models[1], folder, read_metrics(folder / "metrics.csv"), meta["training"])


def _read_model(path: Path, like: nn.Module | None) -> nn.Module:
    if like is None or hasattr(like, "config"):
        return load_model(path)
    import copy

    model = copy.deepcopy(like).cpu()
    load_weights(model, load_tensors(path, MODEL_SCHEMA)[0], path)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's result.

    Args:
        recipe: the recipe.
        values: threat model, seed, fingerprints of pool and plan, TRADES weight, validation, network.
    """

    recipe: Recipe
    values: Mapping[str, Any]

    @cached_property
    def compared(self) -> dict[str, Any]:
        """All of it as one flat table."""
        recipe = self.recipe.model_dump(mode="json", exclude={"name", "source"})
        return {**{f"recipe.{key}": value for key, value in recipe.items()}, **self.values}


def open_folder(folder: Path, settings: Settings, environment: Mapping[str, Any]) -> list[str]:
    """Create a run's folder, or make sure that what is there was made with the same settings.

    Returns:
        What differs in the environment, so that going on is not bit-exact; empty where nothing does.

    Raises:
        ResumeError: it belongs to a run with other settings; both values are named.
        StorageError: it cannot be written.
    """
    prepare_folder(folder)
    path = folder / "run.json"
    if path.is_file():
        before = read_json(path)
        old, new = before["settings"], settings.compared
        missing = object()
        differing = [
            f"{key}: {old.get(key, 'none')!r} there, {new.get(key, 'none')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key, missing) != new.get(key, missing)
        ]
        if differing:
            raise ResumeError(
                f"{folder} holds a run with other settings",
                why="; ".join(differing),
                fix="choose another output folder",
            )
        was = before["environment"]  # an earlier version may have recorded less: what is not known is not named
        return [f"{key} {was[key]} -> {value}" for key, value in environment.items() if was.get(key, value) != value]
    write_text(folder / "recipe.toml", settings.recipe.to_toml())
    write_json(path, {"schema": SCHEMA, "settings": settings.compared, "environment": dict(environment)})
    return []


def environment(devices: Devices) -> dict[str, Any]:
    """What the bits of a result depend on besides its settings."""
    cuda = devices.device.type == "cuda"
    return {
        "puma": __version__,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(devices.device) if cuda else platform.machine(),
        "processor": processor(devices.device),
        "threads": torch.get_num_threads(),
        "processes": devices.world,
    }
