"""Statistics of a study: accuracies, gaps to the control frontiers, differences.

A control (a smaller uniform eps, another TRADES beta, each on all data) gives points of robust and clean accuracy; its
frontier is the undominated ones, joined by straight lines, flat below the least robust of them as far as a point was
measured; NaN beyond. Reasons: docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from puma.errors import UsageError
from puma.tradeoff.intervals import DRAWS, Estimate, Resampled, mean_interval, resample
from puma.tradeoff.results import BASELINE, CONTROLS, Flags, Group, Results, RunKey, RunResult, Setting, read_runs

Array = NDArray[np.float64]
Axis = Literal["clean", "robust"]
Runs = Mapping[int, RunResult]  # of one setting by seed
MIN_POINTS = 2

REDUNDANT = 0.01
"""A pool is redundant where random pruning loses less accuracy than this, with 95 % confidence."""


@dataclass(frozen=True)
class Frontier:
    """The measured points of one control.

    ``name`` is ``"uniform-eps"`` or ``"trades-beta"``; robust and clean accuracies ``[P]`` stand in any order.

    >>> control = Frontier("uniform-eps", [0.2, 0.4, 0.3], [0.9, 0.7, 0.6])
    >>> control.corners
    (array([0.2, 0.4]), array([0.9, 0.7]))
    >>> control.clean_at([0.3, 0.5])
    array([0.8, nan])

    Raises:
        UsageError: lengths differ, or an accuracy is not finite.
    """

    name: str
    robust: Array
    clean: Array

    def __init__(self, name: str, robust: ArrayLike, clean: ArrayLike) -> None:
        points = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
        if points[0].shape != points[1].shape or points[0].ndim != 1 or not np.isfinite(points).all():
            raise UsageError(f"the frontier {name!r} needs as many robust as clean accuracies, all finite")
        for field, value in (("name", name), ("robust", points[0]), ("clean", points[1])):
            object.__setattr__(self, field, value)

    @cached_property
    def corners(self) -> tuple[Array, Array]:
        """The undominated points: robust accuracy rising, clean accuracy falling, both strictly."""
        order = np.lexsort((-self.clean, -self.robust))
        robust, clean = self.robust[order], self.clean[order]
        free = clean > np.concatenate([[-np.inf], np.maximum.accumulate(clean)[:-1]])
        return robust[free][::-1], clean[free][::-1]

    def clean_at(self, robust: ArrayLike) -> Array:
        """The clean accuracy the control reaches at these robust accuracies; NaN outside the measured range."""
        return self._at(robust, self.robust, *self.corners)

    def robust_at(self, clean: ArrayLike) -> Array:
        """The robust accuracy the control reaches at these clean accuracies; NaN outside the measured range."""
        robust, falling = self.corners
        return self._at(clean, self.clean, falling[::-1], robust[::-1])

    def _at(self, wanted: ArrayLike, measured: Array, x: Array, y: Array) -> Array:
        wanted = np.asarray(wanted, np.float64)
        if len(measured) < MIN_POINTS:
            return np.full(wanted.shape, np.nan)
        inside = (wanted >= measured.min()) & (wanted <= measured.max())
        return np.where(inside, np.interp(wanted, x, y), np.nan)


def gap(robust: ArrayLike, clean: ArrayLike, frontiers: Sequence[Frontier], axis: Axis = "clean") -> Array:
    """Distance above the higher frontier: clean accuracy at equal robust (the headline), or the other way round.

    ``robust`` and ``clean`` are accuracies ``[P]``; at each point the highest frontier whose measured range covers it
    decides. ``axis``: ``"clean"`` (clean accuracy at equal robust accuracy) or ``"robust"`` (robust at equal clean).
    Returns float64 ``[P]``, positive = better than the controls; NaN where no frontier reaches (not comparable).

    >>> control = Frontier("uniform-eps", [0.2, 0.4], [0.9, 0.7])
    >>> gap([0.3, 0.5], [0.85, 0.85], [control]).round(3)
    array([0.05,  nan])
    """
    robust, clean = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
    reached = [line.clean_at(robust) if axis == "clean" else line.robust_at(clean) for line in frontiers]
    best: Array = np.fmax.reduce([np.full(robust.shape, np.nan), *reached])
    return (clean if axis == "clean" else robust) - best


def why_not(robust: float, clean: float, frontiers: Sequence[Frontier], axis: Axis = "clean") -> str:
    """The reason a point cannot be compared; empty if it can."""
    if not np.isnan(gap(robust, clean, frontiers, axis)):
        return ""
    usable = [frontier for frontier in frontiers if len(frontier.robust) >= MIN_POINTS]
    if not usable:
        return f"not comparable: no control frontier of at least {MIN_POINTS} points"
    other, value = ("robust", robust) if axis == "clean" else ("clean", clean)
    if np.isnan(value):
        return f"not comparable: no {other} accuracy"
    ranges = [getattr(frontier, other) for frontier in usable]
    low, high = min(points.min() for points in ranges), max(points.max() for points in ranges)
    side = "above" if value > high else "below" if value < low else "between"
    return f"not comparable: {other} accuracy {value:.3f} is {side} what the controls reach ({low:.3f} to {high:.3f})"


def frontiers(points: Iterable[tuple[Setting, float, float]]) -> list[Frontier]:
    """The control frontiers among points (setting, robust, clean) of one group and seed; the baseline is in each."""
    points = [point for point in points if math.isfinite(point[1])]
    own = {name: [point for point in points if point[0].strategy in (name, BASELINE)] for name in CONTROLS}
    return [Frontier(name, [p[1] for p in found], [p[2] for p in found]) for name, found in own.items()]


@dataclass(frozen=True)
class Gap:
    """A setting's mean distance above the higher control frontier, over those of its seeds that can be compared.

    ``estimate`` is None if no seed can; ``seeds`` of ``of`` seeds could; ``note`` says why others could not.
    """

    estimate: Estimate | None
    seeds: int
    of: int
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The statistics of one setting, means over its finished ``seeds``.

    ``clean`` and ``robust`` are accuracies (robust None where it was not measured), ``clean_gap`` the clean accuracy
    above the controls at equal robust accuracy (the headline), ``robust_gap`` the other way round; the differences are
    to the baseline, paired by seed, None without common seeds. ``kept`` images were trained on, with ``mean_eps``;
    ``attack_cost`` is that of the attacks in training, in forward-equivalents.
    """

    group: Group
    setting: Setting
    seeds: tuple[int, ...]
    clean: Estimate
    robust: Estimate | None
    clean_gap: Gap
    robust_gap: Gap
    clean_difference: Estimate | None
    robust_difference: Estimate | None
    kept: float
    mean_eps: float
    attack_cost: float


def compare(
    results: Results,
    flags: Mapping[RunKey, Flags] | None = None,
    *,
    robust: str = "robust_accuracy",
    baseline: str = BASELINE,
    draws: int = DRAWS,
) -> list[Comparison]:
    """Compare all settings of a results table, inside each group (study, pool, recipe, checkpoint).

    Gaps are taken seed by seed against the frontiers of the same seed, then averaged.

    Args:
        results, robust: the table, and its column of robust accuracies; see `read_runs`.
        flags: per-image flags by `RunResult.key`; adds the variance of the test images to every interval.
        baseline: the strategy that differences are taken to.
        draws: bootstrap resamples of the test images.

    Raises:
        DataError: the table is broken, see `read_runs` and `resample`.
    """
    comparisons, table = [], read_runs(results, robust)
    for group in dict.fromkeys(run.group for run in table):
        members, settings = [run for run in table if run.group == group], dict[Setting, dict[int, RunResult]]()
        for run in members:
            settings.setdefault(run.setting, {})[run.seed] = run
        again = resample({run.key: flags[run.key] for run in members if run.key in flags} if flags else {}, draws)
        base: Runs = next((runs for setting, runs in settings.items() if setting.strategy == baseline), {})
        clean_gaps, robust_gaps = (_gaps(settings, again, axis) for axis in ("clean", "robust"))
        for setting, runs in settings.items():
            other = base if setting.strategy != baseline else {}
            clean = _mean(runs, "clean", again) or Estimate(math.nan, None, None, len(runs))
            means = clean, _mean(runs, "robust", again), clean_gaps[setting], robust_gaps[setting]
            changes = _mean(runs, "clean", again, other), _mean(runs, "robust", again, other)
            facts = (_finite_mean(runs.values(), name) for name in ("kept", "mean_eps", "attack_cost"))
            comparisons.append(Comparison(group, setting, tuple(sorted(runs)), *means, *changes, *facts))
    return comparisons


def _finite_mean(runs: Iterable[RunResult], name: str) -> float:
    known = [value for run in runs if math.isfinite(value := getattr(run, name))]
    return float(np.mean(known)) if known else math.nan


def _mean(runs: Runs, axis: str, resampled: Mapping[RunKey, Resampled], minus: Runs | None = None) -> Estimate | None:
    """Mean accuracy over the seeds, or mean difference to another setting over their common seeds."""
    values, again = [], []
    for seed, run in sorted(runs.items()):
        other = None if minus is None else minus.get(seed)
        value = getattr(run, axis) - (getattr(other, axis) if other else 0)
        if (minus is not None and other is None) or not math.isfinite(value):
            continue
        values.append(value)
        if run.key in resampled and (other is None or other.key in resampled):
            drawn = getattr(resampled[run.key], axis)
            again.append(drawn - getattr(resampled[other.key], axis) if other else drawn)
    return _interval(values, again)


def _interval(values: Sequence[float], again: Sequence[Array]) -> Estimate | None:
    """Mean over seeds; with the variance of the test images where every seed has resamples."""
    resampled = np.stack(again, axis=1) if values and len(again) == len(values) else None
    return mean_interval(values, resampled) if values else None


def _gaps(settings: Mapping[Setting, Runs], resampled: Mapping[RunKey, Resampled], axis: Axis) -> dict[Setting, Gap]:
    """Mean gap of each setting over the seeds that can be compared."""
    found: dict[Setting, tuple[list[float], list[Array], list[str]]] = {setting: ([], [], []) for setting in settings}
    for seed in sorted({seed for runs in settings.values() for seed in runs}):
        runs = {setting: by_seed[seed] for setting, by_seed in settings.items() if seed in by_seed}
        controls = frontiers((setting, run.robust, run.clean) for setting, run in runs.items())
        gaps_again = _resampled_gaps(runs, resampled, axis)
        for setting, run in runs.items():
            values, again, notes = found[setting]
            value = float(gap(run.robust, run.clean, controls, axis))
            if math.isnan(value):
                notes.append(why_not(run.robust, run.clean, controls, axis))
            else:
                values.append(value)
                again += [gaps_again[setting]] if setting in gaps_again else []
    summary = {}
    for setting, (values, again, notes) in found.items():
        of = len(settings[setting])
        if setting.is_control:
            summary[setting] = Gap(None, 0, of, "is itself a point of the control frontiers")
            continue
        note = f"{len(values)} of {of} seeds; for the others {notes[0]}" if notes and values else "".join(notes[:1])
        summary[setting] = Gap(_interval(values, again), len(values), of, note)
    return summary


def _resampled_gaps(
    runs: Mapping[Setting, RunResult], resampled: Mapping[RunKey, Resampled], axis: Axis
) -> dict[Setting, Array]:
    """Gaps of one seed's runs under every resample of the test images, float64 ``[B]``; frontiers are built once.

    Empty where a control has no flags: its frontier would stand still while the others move.
    """
    drawn = {setting: resampled[run.key] for setting, run in runs.items() if run.key in resampled}
    compared = [setting for setting in drawn if not setting.is_control]
    if not compared or any(setting.is_control and setting not in drawn for setting in runs):
        return {}
    points = [s for s, again in drawn.items() if s.is_control and np.isfinite(again.robust).all()]
    robust, clean = (np.stack([getattr(drawn[s], a) for s in compared], axis=1) for a in ("robust", "clean"))
    gaps = np.empty_like(clean)
    for b in range(len(gaps)):
        controls = frontiers((s, drawn[s].robust[b], drawn[s].clean[b]) for s in points)
        gaps[b] = gap(robust[b], clean[b], controls, axis)
    return {setting: gaps[:, column] for column, setting in enumerate(compared)}


def redundant(difference: Estimate | None, tolerance: float = REDUNDANT) -> bool:
    """Whether random pruning loses less than ``tolerance`` (lower end of its interval): no data saving can be shown.

    ``difference`` is the accuracy of ``random`` minus that of ``none``, paired by seed.
    """
    return difference is not None and difference.low is not None and difference.low > -tolerance
