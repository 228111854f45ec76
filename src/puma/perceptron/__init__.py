"""The linear task in which PUMA's claims can be computed: closed forms, optimal students, theory, simulations."""

from puma.perceptron.closed_forms import (
    capped_robust_error,
    clean_error,
    collapse_fraction,
    mislabelled_share,
    mislabelled_share_after_pruning,
    residual_mislabelled_mass,
    robust_error,
)
from puma.perceptron.simulate import simulate
from puma.perceptron.solver import fit
from puma.perceptron.strategies import bridge

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
