"""Train students on grids of data amount, kept share, eps and seed; every error of theirs is exact."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from puma.errors import UsageError, unknown
from puma.io import Shards, read_json, write_text
from puma.perceptron.closed_forms import Array, capped_robust_error, clean_error, robust_error
from puma.perceptron.solver import fit
from puma.perceptron.strategies import NAMES, WHOLE, Strategy
from puma.progress import Progress
from puma.tasks import Workers, run_tasks

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "puma.perceptron/2"
Probe = float | Literal["self", "clean"]
TrainingSet = tuple[float, float, int]
"""Data amount, eps and seed."""


@dataclass(frozen=True)
class Block:
    """Coordinates that share one standard deviation.

    Args:
        share: their share of all coordinates.
        scale: their standard deviation.
        signal: the share of the teacher's variance that they carry.
    """

    share: float
    scale: float
    signal: float


TASKS: dict[str, tuple[Block, ...]] = {
    "isotropic": (Block(share=1.0, scale=1.0, signal=1.0),),
    "anisotropic": (Block(share=0.05, scale=1.0, signal=0.7), Block(share=0.95, scale=0.2, signal=0.3)),
}


@dataclass(frozen=True)
class Task:
    """``x ~ N(0, S)`` with diagonal ``S`` constant on blocks, and ``y = sign(w*.x)``.

    ``isotropic``: one block, ``S = I``. It has no accuracy-robustness trade-off and can only show harm.
    ``anisotropic``: few strong coordinates, and many weak ones that carry part of the label. An L2 attack reaches the
    weak ones first, so a robust student has to give up their share of the label: a trade-off, as images have it.
    Inside a block the Gaussian has no preferred direction, so the teacher may lie on one coordinate of each.

    Args:
        blocks: of the coordinates, in order.
        dimension: number of coordinates ``d``.

    >>> task = Task.named("anisotropic", dimension=100)
    >>> task.scale[[0, 5]].tolist(), round(float(task.teacher @ (task.scale**2 * task.teacher)), 12)
    ([1.0, 0.2], 1.0)
    """

    blocks: tuple[Block, ...]
    dimension: int

    @classmethod
    def named(cls, name: str, dimension: int) -> Task:
        """The task called ``name`` (``"isotropic"`` or ``"anisotropic"``) in ``dimension`` coordinates.

        Raises:
            UsageError: another name, or too few coordinates for the blocks.
        """
        if name not in TASKS:
            raise unknown("task", name, TASKS)
        if dimension < 20:
            raise UsageError(f"dimension {dimension} is too small", fix="use 20 coordinates or more")
        return cls(TASKS[name], dimension)

    @cached_property
    def sizes(self) -> list[int]:
        """Coordinates per block."""
        ends = np.rint(np.cumsum([block.share for block in self.blocks]) * self.dimension).astype(int)
        return [int(size) for size in np.diff(ends, prepend=0)]

    @cached_property
    def scale(self) -> Array:
        """Standard deviation of each coordinate ``[d]``."""
        return np.repeat([block.scale for block in self.blocks], self.sizes)

    @cached_property
    def teacher(self) -> Array:
        """Weights of the teacher ``[d]``, with ``w*'S w* = 1``; its L2 margin is ``|w*.x| / |w*|``."""
        weights = np.zeros(self.dimension)
        starts = np.cumsum([0, *self.sizes[:-1]])
        for start, block in zip(starts, self.blocks, strict=True):
            weights[start] = np.sqrt(block.signal) / block.scale
        return weights

    def sample(self, rows: int, rng: np.random.Generator) -> Array:
        """``rows`` examples as label times input ``[rows, d]``; more rows of one seed begin with the fewer."""
        x = rng.standard_normal((rows, self.dimension)) * self.scale
        return x * np.sign(x @ self.teacher)[:, None]

    def overlap(self, weights: Array) -> float:
        """Correlation of student and teacher outputs, in [-1, 1]; NaN for a student of no length."""
        length = float(np.linalg.norm(self.scale * weights))
        if length == 0:
            return float("nan")
        return float(np.clip(weights @ (self.scale**2 * self.teacher) / length, -1, 1))

    def errors(self, weights: Array, eps: float, c: float = 0.5) -> dict[str, float]:
        """Exact errors of a student by the closed forms, without a test set.

        Args:
            weights: ``[d]``; a student of no length guesses, and every attack on it succeeds.
            eps: of the attack at the test.
            c: cap of the label-consistent error.

        Returns:
            ``clean_error``, ``robust_error`` (label fixed) and ``consistent_error`` (attacked with ``min(eps, c s)``).
        """
        length = float(np.linalg.norm(weights))
        stretch = length / float(np.linalg.norm(self.scale * weights)) if length > 0 else math.nan
        return self.errors_at(self.overlap(weights), stretch, eps, c)

    def errors_at(self, overlap: float, stretch: float, eps: float, c: float = 0.5) -> dict[str, float]:
        """The errors of `errors` for a student with this overlap and ``stretch = |w| / |w|_S``."""
        if math.isnan(overlap):
            robust = 1.0 if eps > 0 else 0.5
            return {"clean_error": 0.5, "robust_error": robust, "consistent_error": robust if c > 0 else 0.5}
        # in units of the student's output: eps grows by the stretch, the teacher's distance shrinks by its own length
        cap = c * stretch / float(np.linalg.norm(self.teacher))
        return {
            "clean_error": float(clean_error(overlap)),
            "robust_error": float(robust_error(overlap, eps * stretch)),
            "consistent_error": float(capped_robust_error(overlap, eps * stretch, cap)),
        }


@dataclass(frozen=True)
class Grid:
    """Settings that all training sets of a simulation share; as in `simulate`."""

    task: str = "isotropic"
    strategies: tuple[str, ...] = NAMES
    keeps: tuple[float, ...] = (0.4, 0.6, 0.8)
    dimension: int = 200
    probe: Probe = "self"
    l2: float = 1e-5

    def check(self, alphas: Sequence[float], eps: Sequence[float], seeds: Sequence[int]) -> None:
        """Refuse a grid that cannot be computed, before anything is.

        Raises:
            UsageError: an unknown name or a value out of its range.
        """
        Task.named(self.task, self.dimension)
        for name, values in {"strategies": self.strategies, "keeps": self.keeps, "alphas": alphas, "eps": eps}.items():
            if not len(values):
                raise UsageError(f"{name} is empty")
        for holds, what, why in (
            (seeds and min(seeds) >= 0, f"seeds are {list(seeds)}", "one or more are needed, none negative"),
            (all(0 < keep <= 1 for keep in self.keeps), f"keeps are {self.keeps}", "kept shares lie in (0, 1]"),
            (
                all(math.inf > a * self.dimension >= 2 for a in alphas),
                f"alphas are {alphas}",
                "each needs two examples",
            ),
            (all(math.inf > value >= 0 for value in eps), f"eps are {eps}", "they are finite and not negative"),
            (math.inf > self.l2 > 0, f"l2 is {self.l2}", "separable data have no optimum without a positive penalty"),
        ):
            if not holds:
                raise UsageError(what, why=why)
        if isinstance(self.probe, str):
            if self.probe not in ("self", "clean"):
                raise UsageError(f"unknown probe {self.probe!r}", fix='use "self", "clean" or an angle in radians')
        elif self.task != "isotropic":
            raise UsageError("a probe of given angle is for the isotropic task only", fix='use probe="self"')
        elif not 0 <= self.probe <= math.pi:
            raise UsageError(f"probe angle {self.probe} is not in [0, pi] radians")


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
    fewer. Students are solved to optimality (`fit`), attacked at the test with the training's ``eps``, and their errors
    are computed from the closed forms: there is no test set and no noise but that of the training data.

    Args:
        task: ``"isotropic"`` or ``"anisotropic"`` (`Task`).
        strategies: as `Strategy` reads them, such as ``"puma(0.75)"``.
        alphas: examples per dimension before pruning, ``n / d``.
        keeps: kept shares in (0, 1]; strategies that prune nothing run once.
        eps: of the L2 attack.
        seeds: how many (0, 1, ...), or which.
        dimension: ``d``.
        probe: whose margins decide. ``"self"``: a student adversarially trained on the same data; ``"clean"``: one
            trained there without attack; a number: a probe at that angle (radians) from the teacher, independent of the
            data (isotropic task only).
        l2: penalty of every student.
        out: folder for finished shards and ``simulation.csv``; the same call resumes from what is there.
        workers: processes of one thread each; 1 computes in this one.
        progress: show progress on stderr.

    Returns:
        One row per student, in the order of the grid: ``task, probe, strategy, dimension, alpha, keep, eps, seed``,
        then ``rows`` (kept), ``mean_eps``, ``clean_error``, ``robust_error``, ``consistent_error`` (see `Task.errors`),
        ``overlap`` with the teacher (NaN where collapsed), ``length`` of the weights, ``mislabelled`` (share of kept
        rows that the attack on this student moves across the teacher), ``mean_margin`` (``|mean(y x)|``; training
        collapses iff it is not above ``mean_eps``) and ``collapsed``. The same call on the same machine type with the
        same number of BLAS threads returns the same bits.

    >>> table = simulate(strategies=["none", "easy"], alphas=[3], keeps=[0.5], seeds=1, dimension=40)
    >>> table["strategy"].tolist(), table["rows"].tolist()
    (['none', 'easy'], [120, 60])

    Raises:
        UsageError: an unknown name or a value out of its range.
        ResumeError: ``out`` holds another grid.
        BusyError: ``out`` is being written by another process.
        StorageError: ``out`` cannot be written.
    """
    import pandas as pd

    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    parameters = [Strategy.parse(text).parameters for text in strategies]
    grid = Grid(task, tuple(strategies), tuple(map(float, keeps)), dimension, probe, float(l2))
    grid.check(alphas, eps, numbers)
    if workers < 1:
        raise UsageError(f"workers is {workers}", fix="use 1 or more")
    sets = [(float(alpha), float(value), seed) for alpha, value, seed in itertools.product(alphas, eps, numbers)]
    settings = asdict(grid) | {"parameters": parameters}
    shards = None if out is None else Shards(Path(out) / "shards", settings, suffix=".json", schema=SCHEMA)
    with nullcontext() if shards is None else shards.held():
        rows = _train_all(grid, sets, shards, workers, progress)
        table = pd.DataFrame(rows).astype({"overlap": float})
        if out is not None:
            write_text(Path(out) / "simulation.csv", table.to_csv(index=False))
    return table


def train_students(grid: Grid, training_set: TrainingSet) -> list[dict[str, Any]]:
    """The rows of a simulation's table for one training set."""
    alpha, eps, seed = training_set
    task = Task.named(grid.task, grid.dimension)
    rows = task.sample(round(alpha * grid.dimension), np.random.default_rng([seed, 0]))
    probe = _probe(grid, task, rows, eps, seed)
    length = float(np.linalg.norm(probe))
    margin = rows @ probe / length if length > 0 else np.zeros(len(rows))
    distance = rows @ task.teacher / float(np.linalg.norm(task.teacher))  # to the teacher, never negative
    table = []
    for text in grid.strategies:
        strategy = Strategy.parse(text)
        for keep in (1.0,) if strategy.name in WHOLE else grid.keeps:
            chosen, eps_i = strategy.select(margin, eps, keep, np.random.default_rng([seed, 1]))
            kept = rows[chosen]
            weights = fit(kept, eps_i, grid.l2)
            size = float(np.linalg.norm(weights))
            overlap = task.overlap(weights)
            toward = weights @ task.teacher / (size * np.linalg.norm(task.teacher)) if size > 0 else 0.0
            table.append(
                {
                    "task": grid.task,
                    "probe": grid.probe if isinstance(grid.probe, str) else f"{math.degrees(grid.probe):g} deg",
                    "strategy": text,
                    "dimension": grid.dimension,
                    "alpha": alpha,
                    "keep": keep,
                    "eps": eps,
                    "seed": seed,
                    "rows": len(chosen),
                    "mean_eps": float(eps_i.mean()),
                    **task.errors(weights, eps),
                    "overlap": None if math.isnan(overlap) else overlap,
                    "length": size,
                    "mislabelled": float(np.mean(distance[chosen] < eps_i * toward)),
                    "mean_margin": float(np.linalg.norm(kept.mean(axis=0))),
                    "collapsed": size == 0,
                }
            )
    return table


def _probe(grid: Grid, task: Task, rows: Array, eps: float, seed: int) -> Array:
    """Weights ``[d]`` of the probe; 0 where adversarial training of the probe itself collapses."""
    if isinstance(grid.probe, str):
        return fit(rows, eps if grid.probe == "self" else 0.0, grid.l2)
    side = np.random.default_rng([seed, 2]).standard_normal(grid.dimension)
    side -= (side @ task.teacher) * task.teacher
    return np.asarray(
        math.cos(grid.probe) * task.teacher + math.sin(grid.probe) * side / np.linalg.norm(side), dtype=np.float64
    )


def _train_all(
    grid: Grid, sets: list[TrainingSet], shards: Shards | None, workers: int, progress: bool
) -> list[dict[str, Any]]:
    """The rows of all training sets, in order; finished shards are read, new ones written."""
    keys = {one: "alpha-{!r}_eps-{!r}_seed-{}".format(*one) for one in sets}
    students: dict[TrainingSet, list[dict[str, Any]]] = {}
    if shards is not None:
        missing = set(shards.missing(keys.values()))
        finished = [one for one in sets if keys[one] not in missing]
        students = {one: read_json(shards.path(keys[one])) for one in finished}
    # the largest first, so that no worker is left with one at the end
    left = sorted((one for one in sets if one not in students), key=lambda one: -one[0])
    pool = Workers(count=workers, threads=1)
    with Progress(f"perceptron, {grid.task}", len(sets), "sets", show=progress, done=len(students)) as bar:
        for one, rows in run_tasks(partial(train_students, grid), left, pool):
            students[one] = rows
            if shards is not None:
                with shards.writing(keys[one]) as temporary:
                    temporary.write_text(json.dumps(rows))
            bar.advance()
    return [row for one in sets for row in students[one]]
