"""The perceptron laboratory: the learning task in which PUMA's claims can be computed, and where they stop to hold."""

from puma.perceptron.bridge import bridge
from puma.perceptron.fit import fit
from puma.perceptron.generalisation import capped_robust_error, clean_error, robust_error
from puma.perceptron.mislabelling import (
    collapse_fraction,
    mislabelled_share,
    mislabelled_share_after_pruning,
    residual_mislabelled_mass,
)
from puma.perceptron.simulate import simulate

__all__ = [
    "bridge",
    "capped_robust_error",
    "clean_error",
    "collapse_fraction",
    "fit",
    "mislabelled_share",
    "mislabelled_share_after_pruning",
    "residual_mislabelled_mass",
    "robust_error",
    "simulate",
]
