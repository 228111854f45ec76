"""The standing experiments of the laboratory: five grids, in a default and a full size, and their theory curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from puma.errors import CheckError
from puma.perceptron.simulate import Probe, simulate
from puma.perceptron.table import Table
from puma.perceptron.theory import predict
from puma.perceptron.workers import compute

DIALS = tuple(f"uniform-eps({factor:g})" for factor in (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875))
"""The free control: all data at a smaller uniform eps. Together with ``none`` it traces the frontier."""
PROBE = math.radians(20)
"""Angle of the independent probe: a margin model that is wrong on 11 % of the examples."""


@dataclass(frozen=True)
class Experiment:
    """One grid of `simulate`, and whether a theory curve exists for it.

    Args:
        name: of its folder.
        question: what it asks, one sentence.
        strategies, alphas, keeps, eps, seeds, dimension, task, probe: as in `simulate`.
    """

    name: str
    question: str
    strategies: tuple[str, ...]
    alphas: tuple[float, ...]
    keeps: tuple[float, ...]
    eps: tuple[float, ...]
    seeds: int
    dimension: int
    task: str = "isotropic"
    probe: Probe = PROBE

    def run(self, out: Path | str | None = None, workers: int = 1, progress: bool = False) -> Table:
        """Simulate the grid; with ``out`` finished parts are kept and reused."""
        return simulate(
            self.task,
            self.strategies,
            self.alphas,
            self.keeps,
            self.eps,
            self.seeds,
            dimension=self.dimension,
            probe=self.probe,
            out=out,
            workers=workers,
            progress=progress,
        )


LEARNING = Experiment(
    "learning",
    "How fast do students learn when 40 % of the data are pruned by an independent probe?",
    strategies=("none", "random", "difficult", "easy", "puma"),
    alphas=(1, 2, 3, 5, 8, 12, 20),
    keeps=(0.6,),
    eps=(0.3,),
    seeds=4,
    dimension=200,
)
COLLAPSE = Experiment(
    "collapse",
    "Where does adversarial training on easy-pruned data collapse? The probe is perfect: it sees the true margins.",
    strategies=("random", "easy"),
    alphas=(60,),
    keeps=(0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0),
    eps=(0.3, 0.4, 0.5),
    seeds=4,
    dimension=100,
    probe=0.0,
)
ENDS = Experiment(
    "ends",
    "Which end may be pruned, with scarce and with abundant data, by a margin model trained on the same data?",
    strategies=("none", "random", "difficult", "easy", "puma", "puma-plus"),
    alphas=(2, 5, 20),
    keeps=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    eps=(0.3,),
    seeds=4,
    dimension=100,
    probe="self",
)
TRADEOFF = Experiment(
    "tradeoff",
    "On the task that has a trade-off: do PUMA's students lie above all data with a smaller uniform eps?",
    strategies=(
        "none", *DIALS, "uniform-eps(0)", "random", "difficult", "easy", "puma", "puma(0.25)", "puma(0.75)",
        "puma-plus", "puma-plus(0.5, 0)", "cap-only",
    ),
    alphas=(2, 5, 20),
    keeps=(0.4, 0.6, 0.8),
    eps=(0.25,),
    seeds=4,
    dimension=200,
    task="anisotropic",
    probe="self",
)  # fmt: skip
FRAGILE = replace(
    TRADEOFF,
    name="fragile",
    question="The same with a margin model that is not robust.",
    strategies=("none", *DIALS, "uniform-eps(0)", "puma", "puma-plus"),
    alphas=(20,),
    probe="clean",
)
DEFAULT = (LEARNING, COLLAPSE, ENDS, TRADEOFF, FRAGILE)
FULL = (
    replace(LEARNING, alphas=(*LEARNING.alphas, 30), seeds=12),
    replace(COLLAPSE, keeps=tuple(k / 40 for k in range(8, 41)), seeds=6),
    replace(ENDS, alphas=(1, 2, 5, 10, 20), seeds=12, dimension=200),
    replace(TRADEOFF, seeds=12),
    replace(FRAGILE, seeds=12),
)


def theory(
    experiment: Experiment,
    strategies: Sequence[str],
    alphas: Sequence[float],
    keeps: Sequence[float],
    *,
    workers: int = 1,
) -> Table:
    """The predictions for an experiment at all its attack norms, on axes of your own; columns as `theory.Prediction`.

    A point whose saddle was not found is left out.
    """
    grid = list(itertools.product(strategies, map(float, alphas), map(float, keeps), experiment.eps))
    rows = dict(compute(partial(_predicted, experiment), grid, workers))
    return Table.of(row for point in grid if (row := rows[point]))


def _predicted(experiment: Experiment, point: tuple[str, float, float, float]) -> dict[str, Any]:
    strategy, alpha, keep, eps = point
    angle = experiment.probe if not isinstance(experiment.probe, str) else 0.0
    try:
        student = predict(strategy, alpha, eps, keep, task=experiment.task, angle=angle)
    except CheckError:
        return {}
    axes = {"strategy": strategy, "alpha": alpha, "keep": keep, "eps": eps}
    return axes | asdict(student) | {"collapsed": student.collapsed}
