"""Statistics of a study: accuracies, gaps to the control frontiers, differences, random images needed.

A control (a smaller uniform eps, another TRADES beta, each on all data) gives a few measured points in the plane of
robust and clean accuracy. Its frontier consists of the undominated ones, joined by straight lines. Below the robust
accuracy of the least robust of them it is flat, as far down as a point was measured; beyond the measured range it is
NaN. Reasons: docs/statistics.md.
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
from puma.tradeoff.results import (
    BASELINE,
    CONTROLS,
    Flags,
    Group,
    Results,
    RunKey,
    RunResult,
    Setting,
    by_group,
    by_setting,
    read_runs,
)

Axis = Literal["clean", "robust"]
Runs = Mapping[int, RunResult]  # of one setting by seed
MIN_POINTS = 2

REDUNDANT = 0.01
"""A pool is redundant where random pruning loses less accuracy than this, with 95 % confidence."""

RANDOM = ("random", BASELINE)
"""Strategies whose images are a random sample: random subsets, and whole pools of each size."""


@dataclass(frozen=True)
class Frontier:
    """The measured points of one control.

    Args:
        name: ``"uniform-eps"`` or ``"trades-beta"``.
        robust: robust accuracies ``[P]``, in any order.
        clean: clean accuracies ``[P]`` of the same runs.

    >>> control = Frontier("uniform-eps", [0.2, 0.4, 0.3], [0.9, 0.7, 0.6])
    >>> control.corners
    (array([0.2, 0.4]), array([0.9, 0.7]))
    >>> control.clean_at([0.3, 0.5])
    array([0.8, nan])

    Raises:
        UsageError: lengths differ, or an accuracy is not finite.
    """

    name: str
    robust: NDArray[np.float64]
    clean: NDArray[np.float64]

    def __init__(self, name: str, robust: ArrayLike, clean: ArrayLike) -> None:
        points = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
        if points[0].shape != points[1].shape or points[0].ndim != 1 or not np.isfinite(points).all():
            raise UsageError(f"the frontier {name!r} needs as many robust as clean accuracies, all finite")
        for field, value in (("name", name), ("robust", points[0]), ("clean", points[1])):
            object.__setattr__(self, field, value)

    @cached_property
    def corners(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The undominated points: robust accuracy rising, clean accuracy falling, both strictly."""
        order = np.lexsort((-self.clean, -self.robust))
        robust, clean = self.robust[order], self.clean[order]
        best_before = np.concatenate([[-np.inf], np.maximum.accumulate(clean)[:-1]])
        free = clean > best_before
        return robust[free][::-1], clean[free][::-1]

    def clean_at(self, robust: ArrayLike) -> NDArray[np.float64]:
        """The clean accuracy the control reaches at these robust accuracies; NaN outside the measured range."""
        return self._at(robust, self.robust, *self.corners)

    def robust_at(self, clean: ArrayLike) -> NDArray[np.float64]:
        """The robust accuracy the control reaches at these clean accuracies; NaN outside the measured range."""
        robust, falling = self.corners
        return self._at(clean, self.clean, falling[::-1], robust[::-1])

    def _at(
        self, wanted: ArrayLike, measured: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        wanted = np.asarray(wanted, np.float64)
        if len(measured) < MIN_POINTS:
            return np.full(wanted.shape, np.nan)
        inside = (wanted >= measured.min()) & (wanted <= measured.max())
        return np.where(inside, np.interp(wanted, x, y), np.nan)


def gap(
    robust: ArrayLike, clean: ArrayLike, frontiers: Sequence[Frontier], axis: Axis = "clean"
) -> NDArray[np.float64]:
    """Distance above the higher frontier: clean accuracy at equal robust (the headline), or the other way round.

    Args:
        robust: robust accuracies ``[P]`` of the points that are compared.
        clean: their clean accuracies ``[P]``.
        frontiers: the controls; at each point the highest of those whose measured range covers it decides.
        axis: ``"clean"`` (clean accuracy at equal robust accuracy) or ``"robust"`` (robust at equal clean).

    Returns:
        float64 ``[P]``, positive = better than the controls; NaN where no frontier reaches (not comparable).

    >>> control = Frontier("uniform-eps", [0.2, 0.4], [0.9, 0.7])
    >>> gap([0.3, 0.5], [0.85, 0.85], [control]).round(3)
    array([0.05,  nan])
    """
    robust, clean = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
    reached = [line.clean_at(robust) if axis == "clean" else line.robust_at(clean) for line in frontiers]
    best: NDArray[np.float64] = np.fmax.reduce([np.full(robust.shape, np.nan), *reached])
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
    points, lines = [point for point in points if math.isfinite(point[1])], []
    for name in CONTROLS:
        own = [(robust, clean) for setting, robust, clean in points if setting.strategy in (name, BASELINE)]
        lines.append(Frontier(name, [robust for robust, _ in own], [clean for _, clean in own]))
    return lines


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
        results: the table, see `read_runs`.
        flags: per-image flags by `RunResult.key`; adds the variance of the test images to every interval.
        robust: which column is the robust accuracy.
        baseline: the strategy that differences are taken to.
        draws: bootstrap resamples of the test images.

    Raises:
        DataError: the table is broken, see `read_runs` and `resample`.
    """
    comparisons = []
    for group, members in by_group(read_runs(results, robust)).items():
        settings = by_setting(members)
        again = resample({run.key: flags[run.key] for run in members if run.key in flags} if flags else {}, draws)
        base: Runs = next((runs for setting, runs in settings.items() if setting.strategy == baseline), {})
        clean_gaps, robust_gaps = (_gaps(settings, again, axis) for axis in ("clean", "robust"))
        for setting, runs in settings.items():
            other = base if setting.strategy != baseline else {}
            clean, robust_mean = (_mean(runs, axis, again) for axis in ("clean", "robust"))
            clean_difference, robust_difference = (_mean(runs, axis, again, other) for axis in ("clean", "robust"))
            comparisons.append(
                Comparison(
                    group,
                    setting,
                    tuple(sorted(runs)),
                    clean or Estimate(math.nan, None, None, len(runs)),
                    robust_mean,
                    clean_gaps[setting],
                    robust_gaps[setting],
                    clean_difference,
                    robust_difference,
                    *(_finite_mean(runs.values(), name) for name in ("kept", "mean_eps", "attack_cost")),
                )
            )
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


def _interval(values: Sequence[float], again: Sequence[NDArray[np.float64]]) -> Estimate | None:
    """Mean over seeds; with the variance of the test images where every seed has resamples."""
    if not values:
        return None
    return mean_interval(values, np.stack(again, axis=1) if len(again) == len(values) else None)


def _gaps(settings: Mapping[Setting, Runs], resampled: Mapping[RunKey, Resampled], axis: Axis) -> dict[Setting, Gap]:
    """Mean gap of each setting over the seeds that can be compared."""
    values: dict[Setting, list[float]] = {setting: [] for setting in settings}
    again: dict[Setting, list[NDArray[np.float64]]] = {setting: [] for setting in settings}
    notes: dict[Setting, list[str]] = {setting: [] for setting in settings}
    for seed in sorted({seed for runs in settings.values() for seed in runs}):
        runs = {setting: by_seed[seed] for setting, by_seed in settings.items() if seed in by_seed}
        controls = frontiers((setting, run.robust, run.clean) for setting, run in runs.items())
        gaps_again = _resampled_gaps(runs, resampled, axis)
        for setting, run in runs.items():
            value = float(gap(run.robust, run.clean, controls, axis))
            if math.isnan(value):
                notes[setting].append(why_not(run.robust, run.clean, controls, axis))
            else:
                values[setting].append(value)
                again[setting] += [gaps_again[setting]] if setting in gaps_again else []
    summary = {}
    for setting, by_seed in settings.items():
        count, of, note = len(values[setting]), len(by_seed), (notes[setting] or [""])[0]
        if setting.is_control:
            summary[setting] = Gap(None, 0, of, "is itself a point of the control frontiers")
            continue
        note = f"{count} of {of} seeds; for the others {note}" if note and count else note
        summary[setting] = Gap(_interval(values[setting], again[setting]), count, of, note)
    return summary


def _resampled_gaps(
    runs: Mapping[Setting, RunResult], resampled: Mapping[RunKey, Resampled], axis: Axis
) -> dict[Setting, NDArray[np.float64]]:
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


@dataclass(frozen=True)
class Needed:
    """Random images needed to equal the accuracy (``axis``) of one setting that was trained on ``kept`` images.

    ``images`` is the geometric mean over seeds; None, for the reason in ``note``, unless every seed lies inside the
    measured curve.
    """

    group: Group
    setting: Setting
    axis: Axis
    kept: float
    images: Estimate | None
    note: str = ""


def images_needed(images: ArrayLike, accuracy: ArrayLike, target: float) -> tuple[float, str]:
    """The smallest number of images at which a measured curve, images ``[P]`` and accuracy ``[P]``, reaches ``target``.

    The curve is made monotone (isotonic regression: more random images do not hurt) and joined by straight lines over
    log(images). Returns the number and an empty text, or NaN and why the curve does not contain it.

    >>> images_needed([100, 1000], [0.5, 0.7], 0.8)
    (nan, 'more than 1000: beyond the measured curve')
    """
    from scipy.optimize import isotonic_regression  # 0.5 s to import

    counts, accuracies = np.asarray(images, np.float64), np.asarray(accuracy, np.float64)
    measured = np.isfinite(accuracies) & (counts > 0)
    sizes, place = np.unique(counts[measured], return_inverse=True)
    if len(sizes) < 2:
        return math.nan, "not comparable: random data of at least 2 sizes is needed"
    if not math.isfinite(target):
        return math.nan, "not comparable: no accuracy to reach"
    weights = np.bincount(place).astype(np.float64)
    level = isotonic_regression(np.bincount(place, accuracies[measured]) / weights, weights=weights).x
    level, target = level.round(12), round(target, 12)  # pooled means that are equal in all but the last bit
    if target > level[-1]:
        return math.nan, f"more than {sizes[-1]:.0f}: beyond the measured curve"
    if target < level[0]:
        return math.nan, f"fewer than {sizes[0]:.0f}: before the measured curve"
    right = int(np.argmax(level >= target))
    if right == 0:
        return float(sizes[0]), ""
    share = (target - level[right - 1]) / (level[right] - level[right - 1])
    return float(np.exp(np.interp(share, [0, 1], np.log(sizes[right - 1 : right + 1])))), ""


def random_images_needed(
    results: Results, strategies: Sequence[str] = ("puma", "puma-plus"), *, robust: str = "robust_accuracy"
) -> list[Needed]:
    """Random images needed to equal each setting of ``strategies``, for clean and for robust accuracy.

    The curve of random data goes through the settings ``random`` and ``none`` of all pools of the same study, recipe
    and checkpoint, seed by seed.

    Raises:
        DataError: the table is broken, see `read_runs`.
    """
    curves: dict[tuple[object, ...], list[RunResult]] = {}
    chosen: dict[tuple[Group, Setting], list[RunResult]] = {}
    for run in read_runs(results, robust):
        if run.setting.strategy in RANDOM:
            curves.setdefault(_curve(run), []).append(run)
        if run.setting.strategy in strategies:
            chosen.setdefault((run.group, run.setting), []).append(run)
    axes: tuple[Axis, ...] = ("clean", "robust")
    return [_needed(own, curves, axis) for own in chosen.values() for axis in axes]


def _curve(run: RunResult) -> tuple[object, ...]:
    return run.group.study, run.group.recipe, run.group.checkpoint, run.seed


def _needed(own: Sequence[RunResult], curves: Mapping[tuple[object, ...], Sequence[RunResult]], axis: Axis) -> Needed:
    logs, notes, images = [], [], None
    for run in own:
        curve = curves.get(_curve(run), [])
        count, note = images_needed([r.kept for r in curve], [getattr(r, axis) for r in curve], getattr(run, axis))
        logs.append(math.log(count)) if not note else notes.append(note)
    if not notes:
        mean = mean_interval(logs)
        low, high = (None if end is None else math.exp(end) for end in (mean.low, mean.high))
        images = Estimate(math.exp(mean.value), low, high, mean.seeds)
    some = f"{len(notes)} of {len(own)} seeds: " if len(own) > 1 else ""
    note = f"{some}{notes[0]}" if notes else ""
    return Needed(own[0].group, own[0].setting, axis, float(np.mean([run.kept for run in own])), images, note)


def redundant(difference: Estimate | None, tolerance: float = REDUNDANT) -> bool:
    """Whether random pruning loses less than ``tolerance`` (lower end of its interval): no data saving can be shown.

    ``difference`` is the accuracy of ``random`` minus that of ``none``, paired by seed.
    """
    return difference is not None and difference.low is not None and difference.low > -tolerance
