"""A trained diffusion model: its (EMA) denoiser with all that is needed to draw images from it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puma.errors import ModelError
from puma.generation.config import DiffusionConfig, checked
from puma.generation.edm import Denoiser
from puma.generation.networks import build_network
from puma.io import read_json, write_json
from puma.models.weights import weights_sha256, write_safetensors

SCHEMA = "puma.diffusion/1"


@dataclass(frozen=True)
class Diffusion:
    """A denoiser in eval mode with its configuration and what it was trained on.

    Args:
        denoiser: the EMA weights.
        config: how it was trained.
        image_shape: (H, W, C) of the images.
        class_names: one name per label.
        made_from: seed, source, fingerprint and versions of the training, JSON-able.
    """

    denoiser: Denoiser
    config: DiffusionConfig
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    made_from: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as JSON."""
        return {
            "schema": SCHEMA,
            "config": self.config.model_dump(mode="json"),
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "made_from": self.made_from,
        }

    def weights_sha256(self) -> str:
        """Hex digest of the weights, independent of the file they came from."""
        return weights_sha256(self.denoiser)

    def save(self, folder: Path | str) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, each atomically."""
        folder = Path(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self.denoiser.state_dict().items()}
        write_safetensors(tensors, folder / "model.safetensors", {"puma": json.dumps(self.describe())})
        write_json(folder / "config.json", self.describe() | {"sha256": self.weights_sha256()})

    @classmethod
    def load(cls, folder: Path | str) -> Diffusion:
        """Read what `save` wrote.

        Raises:
            DataError: no model there.
            ModelError: the weights are broken or do not belong to the configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        told = read_json(folder / "config.json")
        try:
            if told["schema"] != SCHEMA:
                raise ModelError(f"{folder} holds {told['schema']!r}, not {SCHEMA!r}")
            height, width, channels = told["image_shape"]
            config = checked(DiffusionConfig, told["config"])
            names = tuple(str(name) for name in told["class_names"])
            made_from, sha256 = dict(told["made_from"]), told["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder}/config.json is not a diffusion model's", why=repr(error)) from None
        denoiser = build_denoiser(config, (height, width, channels), len(names))
        try:
            denoiser.load_state_dict(load_file(folder / "model.safetensors"))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ModelError(f"cannot use {folder}/model.safetensors", why=str(error).splitlines()[0]) from None
        model = cls(denoiser.eval().requires_grad_(False), config, (height, width, channels), names, made_from)
        if model.weights_sha256() != sha256:
            raise ModelError(
                f"the weights in {folder} are not those it was saved with",
                why=f"sha256 {model.weights_sha256()[:12]} now, {sha256[:12]} then",
                fix="train it again, or restore the folder from a copy",
            )
        return model

    def to(self, device: torch.device | str) -> Diffusion:
        """The same model with its weights on ``device``, compiled there if its configuration asks for it."""
        self.denoiser.to(device)
        if self.config.compile and torch.device(device).type == "cuda":
            self.denoiser.network.compile()
        return self


def build_denoiser(config: DiffusionConfig, image_shape: tuple[int, int, int], num_classes: int) -> Denoiser:
    """An untrained denoiser for images (H, W, C); initialised from torch's global generator, so fork that first."""
    height, width, channels = image_shape
    network: nn.Module = build_network(config, (channels, height, width), num_classes)
    return Denoiser(network, config.sigma_data, bf16=config.precision == "bf16")
