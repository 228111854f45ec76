"""The standing experiments on the linear task: five grids, in a default and a full size, and their theory curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puma.errors import CheckError
from puma.perceptron.simulate import Probe, simulate
from puma.perceptron.strategies import WHOLE, Strategy
from puma.perceptron.theory import predict
from puma.tasks import Workers, run_tasks

if TYPE_CHECKING:
    import pandas as pd

UNIFORM_EPS = tuple(f"uniform-eps({factor:g})" for factor in (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875))
"""The free control: all data at a smaller uniform eps. Together with ``none`` it traces the frontier."""
PROBE = math.radians(20)
"""Angle of the independent probe: a margin model that is wrong on 11 % of the examples."""


@dataclass(frozen=True)
class Experiment:
    """One grid of `simulate`.

    Args:
        name: of its folder.
        question: what it answers, one sentence.
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

    def run(self, out: Path | str | None = None, workers: int = 1, progress: bool = False) -> pd.DataFrame:
        """Simulate the grid; with ``out`` finished shards are kept and reused."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("name", "question")}
        return simulate(**settings, out=out, workers=workers, progress=progress)

    def theory(
        self, strategies: Sequence[str], alphas: Sequence[float], keeps: Sequence[float], *, workers: int = 1
    ) -> pd.DataFrame:
        """The predictions at all its eps, on axes of your own; columns as `theory.Prediction`.

        A point whose saddle was not found is left out.
        """
        import pandas as pd

        axes = itertools.product(strategies, map(float, alphas), map(float, keeps), self.eps)
        whole = {text for text in strategies if Strategy.parse(text).name in WHOLE}
        grid = list(dict.fromkeys((text, alpha, 1.0 if text in whole else keep, e) for text, alpha, keep, e in axes))
        rows = dict(run_tasks(partial(_predicted, self), grid, Workers(count=workers, threads=1)))
        return pd.DataFrame([row for point in grid if (row := rows[point])])


def _predicted(experiment: Experiment, point: tuple[str, float, float, float]) -> dict[str, Any]:
    strategy, alpha, keep, eps = point
    angle = experiment.probe if not isinstance(experiment.probe, str) else 0.0
    try:
        student = predict(strategy, alpha, eps, keep, task=experiment.task, angle=angle)
    except CheckError:
        return {}
    axes = {"strategy": strategy, "alpha": alpha, "keep": keep, "eps": eps}
    return axes | asdict(student) | {"collapsed": student.collapsed}


LEARNING = Experiment(
    "learning",
    "How fast do students learn when 40 % of the data are pruned by an independent probe?",
    strategies=("none", "random", "difficult", "easy", "puma(0.5)"),
    alphas=(1, 2, 3, 5, 8, 12, 20),
    keeps=(0.6,),
    eps=(0.3,),
    seeds=4,
    dimension=200,
)
COLLAPSE = Experiment(
    "collapse",
    "Where does adversarial training on easy-pruned data collapse? A perfect probe sees the true margins.",
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
    strategies=("none", "random", "difficult", "easy", "puma(0.5)", "puma-plus"),
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
        "none", *UNIFORM_EPS, "random", "difficult", "easy", "puma(0.25)", "puma(0.5)", "puma(0.75)", "puma(1)",
        "puma-plus", "puma-plus(0.5, 0)", "cap-only(0.5)",
    ),
    alphas=(2, 5, 20),
    keeps=(0.4, 0.6, 0.8),
    eps=(0.25,),
    seeds=4,
    dimension=200,
    task="anisotropic",
    probe="self",
)  # fmt: skip
NONROBUST = replace(
    TRADEOFF,
    name="nonrobust",
    question="The same with a margin model that is not robust.",
    strategies=("none", *UNIFORM_EPS, "puma(0.5)", "puma-plus"),
    alphas=(20,),
    probe="clean",
)
DEFAULT = (LEARNING, COLLAPSE, ENDS, TRADEOFF, NONROBUST)
FULL = (
    replace(LEARNING, alphas=(*LEARNING.alphas, 30), seeds=12),
    replace(COLLAPSE, keeps=tuple(k / 40 for k in range(8, 41)), seeds=6),
    replace(ENDS, alphas=(1, 2, 5, 10, 20), seeds=12, dimension=200),
    replace(TRADEOFF, seeds=12),
    replace(NONROBUST, seeds=12),
)
