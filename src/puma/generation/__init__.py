"""Synthetic training images: a class-conditional EDM diffusion model, its sampler, and how good the images are."""

from __future__ import annotations

from puma.generation.config import DiffusionConfig, SamplerConfig
from puma.generation.diffusion import Diffusion
from puma.generation.synthesis import generate, generate_from

__all__ = ["Diffusion", "DiffusionConfig", "SamplerConfig", "generate", "generate_from"]
