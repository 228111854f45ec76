"""Synthetic images: a class-conditional diffusion model trained, sampled and judged."""
