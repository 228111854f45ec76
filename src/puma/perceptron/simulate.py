"""Train students on grids of data amount, kept share, attack norm and seed; every error of theirs is exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from puma.errors import ResumeError, UsageError
from puma.io import fingerprint, lock, prepare_folder, read_json, write_json
from puma.perceptron.fit import fit
from puma.perceptron.gaussian import Array
from puma.perceptron.selection import WHOLE, Strategy
from puma.perceptron.table import Table
from puma.perceptron.tasks import Task
from puma.perceptron.workers import compute
from puma.progress import Progress

STRATEGIES = ("none", "random", "difficult", "easy", "puma", "puma-plus", "cap-only", "uniform-eps")
SCHEMA = "puma.perceptron/1"

Probe = float | Literal["self", "clean"]
Unit = tuple[float, float, int]
"""Data amount, attack norm and seed of one training set."""


def simulate(
    task: str = "isotropic",
    strategies: Sequence[str] = STRATEGIES,
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
) -> Table:
    """Train a student for every strategy, kept share, data amount, attack norm and seed.

    One seed is one stream of examples and one probe, shared by all strategies; more data of a seed begin with the
    fewer. Students are solved to optimality (`fit`), attacked at the test with the training's ``eps``, and their errors
    are computed from the closed forms: there is no test set and no noise but that of the training data.

    Args:
        task: ``"isotropic"`` or ``"anisotropic"`` (`tasks.Task`).
        strategies: as `selection.Strategy` reads them, such as ``"puma(0.75)"``.
        alphas: examples per dimension before pruning, ``n / d``.
        keeps: kept shares in (0, 1]; strategies that prune nothing run once.
        eps: attack norms (L2).
        seeds: how many (0, 1, ...), or which.
        dimension: ``d``.
        probe: whose margins decide. ``"self"``: a student adversarially trained on the same data; ``"clean"``: one
            trained there without attack; a number: a probe at that angle (radians) from the teacher, independent of the
            data (isotropic task only).
        l2: penalty of every student.
        out: folder for finished parts and ``simulation.csv``; the same call goes on from what it finds there.
        workers: processes; 1 computes here. With more, the calling script needs the usual
            ``if __name__ == "__main__"`` guard, and every worker computes on one thread.
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
        ResumeError: ``out`` holds another grid, or is being written by another process.
        StorageError: ``out`` cannot be written.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    grid = Grid(
        task=task,
        strategies=tuple(str(Strategy.parse(text)) for text in strategies),
        keeps=tuple(float(keep) for keep in keeps),
        dimension=dimension,
        probe=probe,
        l2=float(l2),
    )
    grid.check(alphas, eps, numbers)
    if workers < 1:
        raise UsageError(f"workers is {workers}", fix="use 1 or more")
    units = [(float(a), float(e), s) for a, e, s in itertools.product(alphas, eps, numbers)]
    folder = None if out is None else prepare_folder(out)
    with nullcontext() if folder is None else lock(folder):
        if folder is not None:
            _claim(folder, grid)
        rows = _run(grid, units, folder, workers, progress)
        table = Table.of(itertools.chain.from_iterable(rows))
        if folder is not None:
            table.write(folder / "simulation.csv")
    return table


@dataclass(frozen=True)
class Grid:
    """What is the same for every part of a simulation."""

    task: str
    strategies: tuple[str, ...]
    keeps: tuple[float, ...]
    dimension: int
    probe: Probe
    l2: float

    def check(self, alphas: Sequence[float], eps: Sequence[float], seeds: Sequence[int]) -> None:
        """Refuse a grid that cannot be computed, before anything is."""
        Task.named(self.task, self.dimension)
        for name, values in {"strategies": self.strategies, "keeps": self.keeps, "alphas": alphas, "eps": eps}.items():
            if not len(values):
                raise UsageError(f"{name} is empty")
        if not seeds or min(seeds) < 0:
            raise UsageError(f"seeds are {list(seeds)}", fix="give one or more, none negative")
        if not all(0 < keep <= 1 for keep in self.keeps):
            raise UsageError(f"keeps are {self.keeps}", why="kept shares lie in (0, 1]")
        if not all(math.isfinite(alpha) and alpha * self.dimension >= 2 for alpha in alphas):
            raise UsageError(f"alphas are {tuple(alphas)}", why="each needs two examples or more")
        if not all(math.isfinite(radius) and radius >= 0 for radius in eps):
            raise UsageError(f"eps are {tuple(eps)}", why="attack norms are finite and not negative")
        if not (math.isfinite(self.l2) and self.l2 > 0):
            raise UsageError(f"l2 is {self.l2}", why="separable data have no optimum without a positive penalty")
        if isinstance(self.probe, str):
            if self.probe not in ("self", "clean"):
                raise UsageError(f"unknown probe {self.probe!r}", fix='use "self", "clean" or an angle in radians')
        elif self.task != "isotropic":
            raise UsageError("a probe of given angle is for the isotropic task only", fix='use probe="self"')
        elif not 0 <= self.probe <= math.pi:
            raise UsageError(f"probe angle {self.probe} is not in [0, pi] radians")


def students(grid: Grid, alpha: float, eps: float, seed: int) -> list[dict[str, Any]]:
    """One part of a simulation: all students of one training set."""
    task = Task.named(grid.task, grid.dimension)
    rows = task.draw(round(alpha * grid.dimension), np.random.default_rng([seed, 0]))
    probe = _probe(grid, task, rows, eps, seed)
    length = float(np.linalg.norm(probe))
    margin = rows @ probe / length if length > 0 else np.zeros(len(rows))
    distance = rows @ task.teacher / float(np.linalg.norm(task.teacher))  # to the teacher, never negative
    table = []
    for text in grid.strategies:
        strategy = Strategy.parse(text)
        for keep in (1.0,) if strategy.name in WHOLE else grid.keeps:
            chosen, radii = strategy.select(margin, eps, keep, np.random.default_rng([seed, 1]))
            kept = rows[chosen]
            weights = fit(kept, radii, grid.l2)
            size = float(np.linalg.norm(weights))
            toward = weights @ task.teacher / (size * np.linalg.norm(task.teacher)) if size > 0 else 0.0
            overlap = task.overlap(weights)
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
                    "mean_eps": float(radii.mean()),
                    **task.errors(weights, eps),
                    "overlap": None if math.isnan(overlap) else overlap,
                    "length": size,
                    "mislabelled": float(np.mean(distance[chosen] < radii * toward)),
                    "mean_margin": float(np.linalg.norm(kept.mean(axis=0))),
                    "collapsed": size == 0,
                }
            )
    return table


def _students(grid: Grid, unit: Unit) -> list[dict[str, Any]]:
    return students(grid, *unit)


def _probe(grid: Grid, task: Task, rows: Array, eps: float, seed: int) -> Array:
    """Weights ``[d]`` of the probe; 0 where adversarial training of the probe itself collapses."""
    if isinstance(grid.probe, str):
        return fit(rows, eps if grid.probe == "self" else 0.0, grid.l2)
    side = np.random.default_rng([seed, 2]).standard_normal(grid.dimension)
    side -= (side @ task.teacher) * task.teacher
    return np.asarray(
        math.cos(grid.probe) * task.teacher + math.sin(grid.probe) * side / np.linalg.norm(side), dtype=np.float64
    )


def _run(
    grid: Grid, units: list[Unit], folder: Path | None, workers: int, progress: bool
) -> list[list[dict[str, Any]]]:
    """The rows of every unit, in the order of the units; finished parts are read, new ones written."""
    done: dict[Unit, list[dict[str, Any]]] = {}
    for unit in units:
        if folder is not None and (path := _part(folder, unit)).exists():
            done[unit] = list(read_json(path)["students"])
    # the largest first, so that no worker is left with one at the end
    todo = sorted((unit for unit in units if unit not in done), key=lambda unit: -unit[0])
    with Progress(f"perceptron, {grid.task}", len(units), "sets", show=progress, done=len(done)) as bar:
        for unit, rows in compute(partial(_students, grid), todo, workers):
            if folder is not None:
                write_json(_part(folder, unit), {"schema": SCHEMA, "students": rows})
            done[unit] = rows
            bar.advance()
    return [done[unit] for unit in units]


def _part(folder: Path, unit: Unit) -> Path:
    alpha, eps, seed = unit
    return folder / "parts" / f"alpha-{alpha!r}_eps-{eps!r}_seed-{seed}.json"


def _claim(folder: Path, grid: Grid) -> None:
    """Write the grid's settings into the folder, or refuse a folder that holds parts of another grid."""
    settings: Mapping[str, Any] = {"schema": SCHEMA, **asdict(grid)}
    path = folder / "settings.json"
    if path.exists():
        found = read_json(path)
        if fingerprint(found) != fingerprint(settings):
            names = [key for key in settings if fingerprint(found.get(key)) != fingerprint(settings[key])]
            raise ResumeError(
                f"{folder} holds another simulation",
                why="; ".join(f"{key}: {found.get(key)!r} there, {settings[key]!r} asked for" for key in names),
                fix="choose another folder, or remove this one",
            )
        return
    write_json(path, settings)
