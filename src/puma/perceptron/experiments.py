"""Simulations of the linear task: students on grids of data amount, kept share, eps and seed; the standing experiments.

Every error of a student is exact: there is no test set.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from puma.errors import CheckError, UsageError
from puma.io import Shards, read_json, write_text
from puma.perceptron.task import NAMES, WHOLE, Strategy, Task, fit
from puma.perceptron.theory import predict
from puma.progress import Progress
from puma.tasks import Workers, run_tasks

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "puma.perceptron/3"
Probe = float | Literal["self", "clean"]
TrainingSet = tuple[float, float, int]  # data amount, eps and seed
UNIFORM_EPS = tuple(f"uniform-eps({factor:g})" for factor in (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875))
"""The free control: all data at a smaller uniform eps. Together with ``none`` it traces the frontier."""
PROBE = math.radians(20)
"""Angle of the independent probe: a margin model that is wrong on 11 % of the examples."""


@dataclass(frozen=True)
class Experiment:
    """A grid of students, with the name of its folder and the question that it answers; fields as in `simulate`."""

    name: str
    question: str
    strategies: tuple[str, ...]
    alphas: tuple[float, ...]
    keeps: tuple[float, ...]
    eps: tuple[float, ...] = (0.3,)
    seeds: int | tuple[int, ...] = 4
    dimension: int = 200
    task: str = "isotropic"
    probe: Probe = PROBE
    l2: float = 1e-5

    @property
    def training_sets(self) -> list[TrainingSet]:
        """Every data amount with every eps and seed."""
        seeds = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        return list(itertools.product(map(float, self.alphas), map(float, self.eps), map(int, seeds)))

    def check(self) -> None:
        """Refuse a grid that cannot be computed (`UsageError`), before anything is."""
        Task.named(self.task, self.dimension)
        sets, angle = self.training_sets, not isinstance(self.probe, str)
        for holds, why in (
            (self.strategies and self.keeps and sets, "the grid is empty: it needs one value of each argument"),
            (all(seed >= 0 for *_, seed in sets), f"seeds are {self.seeds}, but none may be negative"),
            (all(0 < keep <= 1 for keep in self.keeps), f"kept shares lie in (0, 1], not {self.keeps}"),
            (all(math.inf > a * self.dimension >= 2 for a, *_ in sets), f"too few examples with alphas {self.alphas}"),
            (all(math.inf > e >= 0 for _, e, _ in sets), f"eps are finite and not negative, not {self.eps}"),
            (math.inf > self.l2 > 0, f"separable data have no optimum with l2 {self.l2}"),
            (angle or self.probe in ("self", "clean"), f'a probe is "self", "clean" or an angle, not {self.probe!r}'),
            (not angle or self.task == "isotropic", "the probe is an angle on the isotropic task only"),
            (not angle or 0 <= float(self.probe) <= math.pi, f"an angle lies in [0, pi] radians, not {self.probe!r}"),
        ):
            if not holds:
                raise UsageError("cannot simulate this grid", why=why)

    def run(self, out: Path | str | None = None, workers: int = 1, progress: bool = False) -> pd.DataFrame:
        """Simulate the grid; with ``out`` finished shards are kept and reused."""
        import pandas as pd

        parameters = [Strategy.parse(text).parameters for text in self.strategies]
        self.check()
        if workers < 1:
            raise UsageError(f"workers is {workers}", fix="use 1 or more")
        shared = {name: getattr(self, name) for name in ("task", "strategies", "keeps", "dimension", "probe", "l2")}
        settings = shared | {"parameters": parameters}
        shards = None if out is None else Shards(Path(out) / "shards", settings, suffix=".json", schema=SCHEMA)
        keys = {one: "alpha-{!r}_eps-{!r}_seed-{}".format(*one) for one in self.training_sets}
        with nullcontext() if shards is None else shards.held():
            missing = set(keys.values() if shards is None else shards.missing(keys.values()))
            found = {one: key for one, key in keys.items() if key not in missing}
            students = {} if shards is None else {one: read_json(shards.path(key)) for one, key in found.items()}
            # the largest first, so that no worker is left with one at the end
            left = sorted((one for one in keys if one not in students), key=lambda one: -one[0])
            pool = Workers(count=workers, threads=1)
            with Progress(f"perceptron, {self.task}", len(keys), "sets", show=progress, done=len(students)) as bar:
                for one, rows in run_tasks(partial(train_students, self), left, pool):
                    students[one] = rows
                    if shards is not None:
                        with shards.writing(keys[one]) as temporary:
                            temporary.write_text(json.dumps(rows))
                    bar.advance()
            table = pd.DataFrame([row for one in keys for row in students[one]]).astype({"overlap": float})
            if out is not None:
                write_text(Path(out) / "simulation.csv", table.to_csv(index=False))
        return table

    def cost(self, out: Path) -> tuple[int, int, float]:
        """Training sets, those finished in ``out``, and seconds of the rest: the smallest is timed, others by size."""
        sets, finished = self.training_sets, len(list((out / self.name / "shards").glob("*.json")))
        smallest, began = min(sets), perf_counter()
        train_students(self, smallest)
        whole = (perf_counter() - began) / smallest[0] * sum(alpha for alpha, *_ in sets)
        return len(sets), finished, whole * max(0, len(sets) - finished) / len(sets)

    def theory(
        self, strategies: Sequence[str], alphas: Sequence[float], keeps: Sequence[float], *, workers: int = 1
    ) -> pd.DataFrame:
        """Predictions at all its eps on the isotropic task; points whose saddle was not found are left out."""
        import pandas as pd

        axes = itertools.product(strategies, map(float, alphas), map(float, keeps), self.eps)
        whole = {text for text in strategies if Strategy.parse(text).name in WHOLE}
        grid = list(dict.fromkeys((text, alpha, 1.0 if text in whole else keep, e) for text, alpha, keep, e in axes))
        rows = dict(run_tasks(partial(_predicted, self), grid, Workers(count=workers, threads=1)))
        return pd.DataFrame([row for point in grid if (row := rows[point])])


def simulate(
    task: str = "isotropic",
    strategies: Sequence[str] = NAMES,
    alphas: Sequence[float] = (5.0,),
    keeps: Sequence[float] = (0.4, 0.6, 0.8),
    eps: Sequence[float] = (0.3,),
    seeds: int | Sequence[int] = 4,
    *,
    dimension: int = 200,
    probe: Probe = "self",
    l2: float = 1e-5,
    out: Path | str | None = None,
    workers: int = 1,
    progress: bool = False,
) -> pd.DataFrame:
    """Train a student for every strategy, kept share, data amount, eps and seed.

    One seed is one stream of examples and one probe, shared by all strategies; more data of a seed begin with the
    fewer. Students are solved to optimality (`fit`) and attacked at the test with the training's ``eps``.

    Args:
        task: ``"isotropic"`` or ``"anisotropic"`` (`Task`).
        strategies: as `Strategy` reads them, such as ``"puma(0.75)"``.
        alphas: examples per dimension before pruning, ``n / d``.
        keeps: kept shares in (0, 1]; strategies that prune nothing run once.
        eps: of the L2 attack.
        seeds: how many (0, 1, ...), or which.
        dimension: ``d``.
        probe: whose margins decide. ``"self"``: a student adversarially trained on the same data; ``"clean"``: one
            trained there without attack; a number: one at that angle (radians) from the teacher, on the isotropic task.
        l2: penalty of every student.
        out: folder for finished shards and ``simulation.csv``; the same call resumes from what is there.
        workers: processes of one thread each; 1 computes in this one.
        progress: show progress on stderr.

    Returns:
        One row per student, in the order of the grid: the grid's values, ``rows`` (kept), ``mean_eps``, the errors of
        `Task.errors`, ``overlap`` with the teacher (NaN where collapsed), ``length`` of the weights, ``mislabelled``
        (share of kept rows that the attack on this student moves across the teacher), ``mean_margin`` (``|mean(y x)|``)
        and ``collapsed``. Same machine type and number of BLAS threads: the same bits.

    >>> table = simulate(strategies=["none", "easy"], alphas=[3], keeps=[0.5], seeds=1, dimension=40)
    >>> table["strategy"].tolist(), table["rows"].tolist()
    (['none', 'easy'], [120, 60])

    `UsageError` for an unknown name or a value out of its range; `ResumeError` where ``out`` holds another grid, or is
    being written (`BusyError`); `StorageError` where it cannot be written.
    """
    which = seeds if isinstance(seeds, int) else tuple(seeds)
    axes = tuple(strategies), tuple(alphas), tuple(map(float, keeps)), tuple(eps), which
    return Experiment("", "", *axes, dimension, task, probe, float(l2)).run(out, workers, progress)


def train_students(grid: Experiment, training_set: TrainingSet) -> list[dict[str, Any]]:
    """The rows of a simulation's table for one training set."""
    table: list[dict[str, Any]] = []
    alpha, eps, seed = training_set
    task = Task.named(grid.task, grid.dimension)
    rows = task.sample(round(alpha * grid.dimension), np.random.default_rng([seed, 0]))
    if isinstance(grid.probe, str):
        probe = fit(rows, eps if grid.probe == "self" else 0.0, grid.l2)
    else:
        side = np.random.default_rng([seed, 2]).standard_normal(grid.dimension)
        side -= (side @ task.teacher) * task.teacher
        probe = math.cos(grid.probe) * task.teacher + math.sin(grid.probe) * side / np.linalg.norm(side)
    probe_name = grid.probe if isinstance(grid.probe, str) else f"{math.degrees(grid.probe):g} deg"
    length = float(np.linalg.norm(probe))
    margin = rows @ probe / length if length > 0 else np.zeros(len(rows))
    distance = rows @ task.teacher / float(np.linalg.norm(task.teacher))  # to the teacher, never negative
    for text in grid.strategies:
        strategy = Strategy.parse(text)
        for keep in (1.0,) if strategy.name in WHOLE else grid.keeps:
            chosen, eps_i = strategy.select(margin, eps, keep, np.random.default_rng([seed, 1]))
            weights = fit(rows[chosen], eps_i, grid.l2)
            size, overlap = float(np.linalg.norm(weights)), task.overlap(weights)
            toward = weights @ task.teacher / (size * np.linalg.norm(task.teacher)) if size > 0 else 0.0
            point: dict[str, Any] = {"task": grid.task, "probe": probe_name, "strategy": text}
            point |= {"dimension": grid.dimension, "alpha": alpha, "keep": keep, "eps": eps, "seed": seed}
            point |= {"rows": len(chosen), "mean_eps": float(eps_i.mean()), **task.errors(weights, eps)}
            point |= {"overlap": None if math.isnan(overlap) else overlap, "length": size, "collapsed": size == 0}
            point["mislabelled"] = float(np.mean(distance[chosen] < eps_i * toward))
            table.append(point | {"mean_margin": float(np.linalg.norm(rows[chosen].mean(axis=0)))})
    return table


def _predicted(experiment: Experiment, point: tuple[str, float, float, float]) -> dict[str, Any]:
    strategy, alpha, keep, eps = point
    angle = experiment.probe if not isinstance(experiment.probe, str) else 0.0
    try:
        student = predict(strategy, alpha, eps, keep, angle=angle)
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
)
COLLAPSE = Experiment(
    "collapse",
    "Where does adversarial training on easy-pruned data collapse? A perfect probe sees the true margins.",
    strategies=("random", "easy"),
    alphas=(60,),
    keeps=(0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0),
    eps=(0.3, 0.4, 0.5),
    dimension=100,
    probe=0.0,
)
ENDS = Experiment(
    "ends",
    "Which end may be pruned, with scarce and with abundant data, by a margin model trained on the same data?",
    strategies=("none", "random", "difficult", "easy", "puma(0.5)", "puma-plus"),
    alphas=(2, 5, 20),
    keeps=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
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
    task="anisotropic",
    probe="self",
)  # fmt: skip
DEFAULT = (LEARNING, COLLAPSE, ENDS, TRADEOFF)
FULL = (
    replace(LEARNING, alphas=(*LEARNING.alphas, 30), seeds=12),
    replace(COLLAPSE, keeps=tuple(k / 40 for k in range(8, 41)), seeds=6),
    replace(ENDS, alphas=(1, 2, 5, 10, 20), seeds=12, dimension=200),
    replace(TRADEOFF, seeds=12),
)
