"""Checkpoints: the state of a training as named tensors. Written whole, checked by a checksum when read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from puma.errors import ModelError, first_line
from puma.models.weights import load_tensors, load_weights, save_tensors

SCHEMA = "puma.state/2"
_KEPT = 2

log = logging.getLogger("puma")


def save_state(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the state after ``step`` steps to ``folder`` and remove all but the two newest."""
    path = folder / f"state-{step:09d}.safetensors"
    save_tensors(tensors, path, SCHEMA, {"step": step, **meta})
    for old in sorted(folder.glob("state-*.safetensors"))[:-_KEPT]:
        with suppress(OSError):
            old.unlink()
    return path


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state that is whole, (tensors, meta); None where there is none, `ModelError` if all are damaged."""
    problems = []
    for path in sorted(folder.glob("state-*.safetensors"), reverse=True):
        try:
            return load_tensors(path, SCHEMA)
        except ModelError as error:
            problems.append(error.what)
            log.warning("%s; going back to the state before it", error.what)
    if problems:
        raise ModelError("no state of this run is whole", why="; ".join(problems), fix="train again in another folder")
    return None


def require_savable(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state to ``folder`` and remove it again: `ModelError` where it cannot be written as tensors."""
    trial = folder / "trial.safetensors"
    try:
        save_tensors(tensors, trial, SCHEMA, {})
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError("the network cannot be saved", why=first_line(error)) from error
    finally:
        trial.unlink(missing_ok=True)


def pack(network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A network, its EMA and what the optimiser remembers of each parameter, as named tensors."""
    tensors = {f"model.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in average.state_dict().items()}
    for name, parameter in network.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{kind}.{name}"] = value
    return tensors


def unpack(
    tensors: Mapping[str, Tensor], network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore what `pack` gave (`ModelError` for another network); other tensors are left to the caller."""

    def group(start: str) -> dict[str, Tensor]:
        return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}

    load_weights(network, group("model."), "the checkpoint's network")
    load_weights(average, group("ema."), "the checkpoint's average")
    parameters = dict(network.named_parameters())
    for place, value in group("optimizer.").items():
        kind, _, name = place.partition(".")
        parameter = parameters[name]
        # In the parameter's own memory format: a fused optimiser walks memory, and other strides change sums.
        kept = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][kind] = kept.to(parameter.device).copy_(value)
