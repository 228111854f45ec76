"""What a margin table depends on, and the machine it was made on."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from puma.attacks.deepfool import Mode, Precision, parse_mode, parse_precision
from puma.data.pool import Pool
from puma.devices import processor
from puma.errors import UsageError
from puma.margins import PART_ROWS
from puma.models.weights import weights_sha256
from puma.threat import Norm, parse_norm


@dataclass(frozen=True)
class ScoringSettings:
    """Everything but the model and the pool that decides the bytes of a table.

    Args:
        norm: ``"Linf"`` or ``"L2"``.
        mode: a mode of `puma.deepfool`.
        steps: linearisations at most for one image.
        batch_size: images read and searched together; its boundaries are fixed within a part.
        chunk: images per pass through the model.
        part_rows: rows of one part.
        precision: of gradients, ``"float32"`` or ``"bf16"``; crossings are seen in float32 either way.
        compile: search with ``torch.compile``'s version of the model; crossings are confirmed by the model itself.

    Raises:
        UsageError: unknown norm, mode or precision, a number that is not positive.
    """

    norm: Norm = "Linf"
    mode: Mode = "refined"
    steps: int = 50
    batch_size: int = 512
    chunk: int = 64
    part_rows: int = PART_ROWS
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        parse_norm(self.norm)
        parse_mode(self.mode)
        parse_precision(self.precision)
        for name in ("steps", "batch_size", "chunk", "part_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} has to be positive, not {getattr(self, name)}")

    def meta(self, model: nn.Module, pool: Pool) -> dict[str, Any]:
        """The metadata of the table, as in `puma.margins.MarginTable`."""
        settings = asdict(self)
        norm, mode = settings.pop("norm"), settings.pop("mode")
        config = getattr(model, "config", None)
        name = config.get("name") if isinstance(config, dict) else type(model).__name__
        return {
            "norm": norm,
            "mode": mode,
            "settings": settings,
            "model": {"name": name, "sha256": weights_sha256(model)},
            "pool": pool.describe(),
        }


def sized(
    norm: str,
    mode: str,
    device_type: str,
    *,
    steps: int = 50,
    batch_size: int | None = None,
    chunk: int | None = None,
    part_rows: int = PART_ROWS,
    precision: str = "float32",
    compile: bool = False,
) -> ScoringSettings:
    """The settings, with sizes that suit the device where None is given.

    On a processor 64 images a pass stay in its cache; a GPU wants as many as fill it.

    Raises:
        UsageError: as `ScoringSettings`.
    """
    batch, piece = (4096, 1024) if device_type == "cuda" else (512, 64)
    return ScoringSettings(
        norm=parse_norm(norm),
        mode=parse_mode(mode),
        steps=steps,
        batch_size=batch_size or batch,
        chunk=chunk or piece,
        part_rows=part_rows,
        precision=parse_precision(precision),
        compile=compile,
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What may change the last bits of a margin: recorded beside the parts, and named where it differs."""
    return {
        "puma": version("puma-robust"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": f"{device.type} {processor(device)}",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cores": os.cpu_count(),
    }
