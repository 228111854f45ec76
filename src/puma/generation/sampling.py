"""Draw images from a trained diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from puma.errors import UsageError
from puma.generation.config import SamplerConfig
from puma.generation.diffusion import Diffusion
from puma.generation.edm import Churn, guided, sample, schedule
from puma.rng import image_noise


@dataclass(frozen=True)
class DiffusionDrawer:
    """Our diffusion model as a drawer: image k of a seed has its own noise, whatever the batch.

    Raises:
        UsageError: guidance of a model that never learnt images without labels, or noise levels that do not descend.
    """

    model: Diffusion
    seed: int = 0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.model.config.label_dropout)

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, seed and sampler."""
        sampler = self.sampler.model_dump(mode="json", exclude={"batch_size", "part_rows", "labels"})
        return {"weights": self.model.weights_sha256(), "seed": self.seed, "sampler": sampler}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.model.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label."""
        return self.model.class_names

    def __call__(self, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images ``indices`` under ``labels``; uint8 [B, H, W, C]."""
        return to_pixels(sample_images(self.model, indices, labels, seed=self.seed, sampler=self.sampler))


@torch.inference_mode()
def sample_images(
    model: Diffusion,
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    *,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
) -> NDArray[np.float64]:
    """Generated images ``indices`` of ``seed`` under ``labels``, in [-1, 1] but not clipped; float64 [B, H, W, C].

    Another batch size or order gives image k again up to the network's rounding, which depends on the batch: in
    float32 within 1e-3 here, a small part of the grey level (1/127.5) that `to_pixels` rounds to.
    """
    sampler = sampler or SamplerConfig()
    height, width, channels = model.image_shape
    device = next(model.denoiser.parameters()).device
    shape = (channels, height, width)
    images = sample(
        guided(model.denoiser, torch.from_numpy(labels).to(device), model.num_classes, sampler.guidance),
        torch.from_numpy(image_noise(seed, indices, 0, shape)).to(device),
        schedule(sampler.steps, sampler.sigma_min, sampler.sigma_max, sampler.rho),
        churn=Churn(sampler.churn, sampler.churn_low, sampler.churn_high, sampler.churn_scale),
        fresh_noise=lambda step: torch.from_numpy(image_noise(seed, indices, step + 1, shape)).to(device),
    )
    return images.permute(0, 2, 3, 1).cpu().numpy()


def check_sampler(sampler: SamplerConfig, label_dropout: float) -> None:
    """Refuse sampler settings that a model with this label dropout cannot serve.

    Raises:
        UsageError: see `DiffusionDrawer`.
    """
    if sampler.sigma_min >= sampler.sigma_max:
        raise UsageError(f"sigma_min {sampler.sigma_min:g} is not below sigma_max {sampler.sigma_max:g}")
    if sampler.guidance != 1 and label_dropout == 0:
        raise UsageError(
            f"guidance {sampler.guidance:g} needs a model that also learnt images without labels",
            why="its label_dropout is 0",
            fix="train one with label_dropout=0.1",
        )


def to_pixels(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    """From [-1, 1] to the nearest of 0..255, clipped.

    >>> to_pixels(np.array([-1.2, -1.0, 0.0, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)
