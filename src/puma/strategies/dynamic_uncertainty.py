"""Dynamic uncertainty under attack, carried from a small scored set to millions of synthetic images by neighbours."""

from __future__ import annotations

import numpy as np

from puma.strategies.features import Features, extrapolate, read_features
from puma.strategies.problem import Choice, Problem, whole
from puma.strategies.registry import strategy


@strategy(
    "dynamic-uncertainty",
    prunes="low uncertainty",
    source="Nieth et al. 2024, arXiv 2406.13283; He et al. 2023, arXiv 2306.05175",
    needs=("dynamic-uncertainty",),
)
def dynamic_uncertainty(problem: Problem, *, features: Features | None = None, neighbours: int = 10) -> Choice:
    """Drop the images whose probability of the label varies least over training; full eps.

    Rows without a score get the mean score of their ``neighbours`` nearest rows in ``features`` (an array ``[N, D]`` or
    a .npy file); without features they are kept.
    """
    scores = problem.score("dynamic-uncertainty")
    unscored = int(np.count_nonzero(np.isnan(scores)))
    if features is None or not unscored:
        return Choice(problem.drop(scores, "low"), problem.uniform())
    neighbours = whole("neighbours", neighbours, low=1)
    scores = extrapolate(scores, read_features(features, len(problem)), neighbours)
    return Choice(problem.drop(scores, "low"), problem.uniform(), {"extrapolated": unscored})
