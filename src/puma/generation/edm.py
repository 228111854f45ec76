"""The EDM diffusion model of Karras et al. 2022 (arXiv 2206.00364): preconditioning, loss, schedule and sampler.

A *denoiser* is a callable ``(noisy [B, C, H, W], sigma [B]) -> [B, C, H, W]`` that returns the expected clean image.
Images are in [-1, 1]; ``sigma`` is the standard deviation of the noise in the same unit.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

Denoise = Callable[[Tensor, Tensor], Tensor]


class Coefficients(NamedTuple):
    """D(x) = c_skip * x + c_out * F(c_in * x, c_noise): unit variance in and out (table 1, "Ours"; appendix B.6)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float) -> Coefficients:
    """The four factors of the preconditioning, each of the shape of sigma."""
    total = sigma**2 + sigma_data**2
    return Coefficients(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)


class Denoiser(nn.Module):
    """A network with EDM preconditioning around it: ``(noisy, sigma, label, augment) -> clean``."""

    def __init__(self, network: nn.Module, sigma_data: float, *, bf16: bool = False) -> None:
        super().__init__()
        self.network, self.sigma_data, self.bf16 = network, sigma_data, bf16

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        """Denoise ``noisy`` [B, C, H, W] at noise ``sigma`` [B] under ``label`` int64 [B]; float32 out."""
        factors = coefficients(sigma.float(), self.sigma_data)
        noisy = noisy.float()
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.bf16):
            raw: Tensor = self.network(factors.c_in[:, None, None, None] * noisy, factors.c_noise, label, augment)
        return factors.c_skip[:, None, None, None] * noisy + factors.c_out[:, None, None, None] * raw.float()


def sample_sigma(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Noise levels for training, log-normal: ln sigma ~ N(mean, std^2) (table 1, P_mean and P_std); float32 [count]."""
    return (torch.randn(count, generator=generator, device=generator.device) * std + mean).exp()


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Weight 1 / c_out^2 that gives every noise level the same expected loss at initialisation (section 5)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def loss(
    denoiser: Denoiser, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor, augment: Tensor | None = None
) -> Tensor:
    """Weighted squared error of each denoised image, mean over its pixels; float32 [B] (equation 8).

    ``images`` [B, C, H, W] are clean, ``noise`` is standard normal of their shape; ``labels`` int64 [B] are
    ``num_classes`` where dropped; ``augment`` [B, A] is the augmentation each image went through.
    """
    denoised: Tensor = denoiser(images + sigma[:, None, None, None] * noise, sigma, labels, augment)
    return loss_weight(sigma, denoiser.sigma_data) * ((denoised - images) ** 2).flatten(1).mean(1)


def schedule(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels of sampling, from ``sigma_max`` down to ``sigma_min``, then 0; float64 [steps + 1] (equation 5)."""
    position = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + position * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def sample(denoise: Denoise, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Solve the probability-flow ODE from pure noise to images by Heun's method (algorithm 1).

    From standard normal ``noise`` [B, C, H, W] and the noise levels of `schedule` to images around [-1, 1], not
    clipped, float64 as in the authors' code; the denoiser, bound to its labels, may compute in anything.
    """

    def slope(state: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(state),), sigma, dtype=torch.float64, device=state.device)
        return (state - denoise(state, level).double()) / sigma

    levels = sigmas.tolist()
    state: Tensor = noise.double() * levels[0]
    for sigma, target in pairwise(levels):
        first = slope(state, sigma)
        moved = state + (target - sigma) * first
        if target > 0:
            moved = state + (target - sigma) * (first + slope(moved, target)) / 2
        state = moved
    return state


def guided(denoiser: Denoiser, labels: Tensor, no_label: int, guidance: float = 1.0) -> Denoise:
    """Bind labels int64 [B] to a denoiser, with classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    ``no_label`` means "none" (``num_classes``). Guidance 1 is the plain conditional model; above 1 gives better
    agreement with the label and less variety, of a denoiser that was trained with label dropout.
    """

    def denoise(noisy: Tensor, sigma: Tensor) -> Tensor:
        conditional: Tensor = denoiser(noisy, sigma, labels)
        if guidance == 1.0:
            return conditional
        unconditional: Tensor = denoiser(noisy, sigma, torch.full_like(labels, no_label))
        return unconditional + guidance * (conditional - unconditional)

    return denoise
