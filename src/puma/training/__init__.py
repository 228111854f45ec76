"""Adversarial training on a plan: `train` and what it returns."""

from puma.training.loop import train
from puma.training.run import Run

__all__ = ["Run", "train"]
