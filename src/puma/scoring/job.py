"""A margin model and a pool named by text, so that another process or machine can open the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.errors import ModelError, UsageError
from puma.models.weights import weights_sha256
from puma.models.zoo import resolve_model


@dataclass(frozen=True)
class ScoringJob:
    """What to score, and with what.

    Args:
        model: a weights file, a run folder, or ``"package.module:factory"``; see `puma.models.zoo.resolve_model`.
        sources: specs of `puma.load_dataset`, in the order of the pool.
        weights: safetensors file for a factory.
        roles: ``"real"`` or ``"synthetic"`` for each source; None as in `Pool`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"`` takes a GPU if there is one.
        threads: of the processor; 0 leaves it to torch.
    """

    model: str
    sources: tuple[str, ...]
    weights: str | None = None
    roles: tuple[str, ...] | None = None
    device: str = "auto"
    threads: int = 0

    def open(self) -> tuple[nn.Module, Pool]:
        """Build the model, in eval mode on its device, and open the pool.

        Raises:
            UsageError: a device that is not there.
            ModelError: a model that cannot be built.
            DataError: a source that cannot be read.
        """
        if self.threads:
            torch.set_num_threads(self.threads)
        device = resolve_device(self.device)
        pool = Pool([load_dataset(source) for source in self.sources], roles=self.roles)
        model = resolve_model(self.model, self.weights)
        return model.eval().to(device), pool

    def open_same(self, sha256: str) -> tuple[nn.Module, Pool]:
        """As `open`, and the weights must be those with this digest.

        Raises:
            ModelError: the other machine built a model with other weights.
        """
        model, pool = self.open()
        if (found := weights_sha256(model)) != sha256:
            raise ModelError(
                f"{self.model} has other weights here ({found[:12]}) than where scoring began ({sha256[:12]})",
                why="a factory that draws its weights at random, or another file at that path",
                fix="give --weights, and a path that is the same file on every machine",
            )
        return model, pool


def resolve_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", fix="cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no device {name!r} here", why=f"{torch.cuda.device_count()} GPUs are visible")
    return device
