"""Synthetic training images: a class-conditional EDM diffusion model, its sampler, and how good the images are."""

from __future__ import annotations

from puma.generation.diffusion import Diffusion
from puma.generation.networks import DiffusionConfig, diffusion_config
from puma.generation.quality import measure
from puma.generation.sampling import SamplerConfig, generate, generate_from

__all__ = ["Diffusion", "DiffusionConfig", "SamplerConfig", "diffusion_config", "generate", "generate_from", "measure"]
