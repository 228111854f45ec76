"""The linear task in which PUMA's claims can be computed: closed forms, optimal students, theory, simulations."""

from puma.perceptron.closed_forms import (
    clean_error,
    collapse_fraction,
    mislabelled_share,
    mislabelled_share_after_pruning,
    residual_mislabelled_mass,
    robust_error,
)
from puma.perceptron.experiments import simulate
from puma.perceptron.task import fit

__all__ = [
    "clean_error",
    "collapse_fraction",
    "fit",
    "mislabelled_share",
    "mislabelled_share_after_pruning",
    "residual_mislabelled_mass",
    "robust_error",
    "simulate",
]
