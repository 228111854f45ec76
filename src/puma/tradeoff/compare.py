"""Statistics of a study: each setting's accuracies, gap to the controls, difference to the baseline, dominance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puma.tradeoff.frontier import Axis, Frontier, gap, why_not
from puma.tradeoff.intervals import DRAWS, LEVEL, Estimate, Flags, Resampled, mean_interval, resample
from puma.tradeoff.results import (
    BASELINE,
    CONTROLS,
    Group,
    Results,
    RunKey,
    RunResult,
    Setting,
    by_group,
    by_setting,
    read_runs,
)

Runs = Mapping[int, RunResult]  # of one setting by seed


@dataclass(frozen=True)
class Gap:
    """A setting's mean distance above the higher control frontier.

    Args:
        estimate: mean over the seeds that could be compared, None if none could.
        seeds: how many of the setting's seeds could be compared.
        of: how many seeds the setting has.
        note: why a seed (or all) could not be compared; empty if all could.
    """

    estimate: Estimate | None
    seeds: int
    of: int
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The statistics of one setting.

    Args:
        group: study, pool, recipe and checkpoint, the same for all that is compared.
        setting: strategy, parameters, prune fraction.
        seeds: the seeds that have finished.
        clean: clean accuracy.
        robust: robust accuracy, None where it was not measured.
        clean_gap: clean accuracy above the controls at equal robust accuracy: the headline.
        robust_gap: robust accuracy above the controls at equal clean accuracy.
        clean_difference: clean accuracy minus that of the baseline, paired by seed; None without common seeds.
        robust_difference: the same for robust accuracy.
        kept: mean number of images trained on.
        mean_eps: mean eps of the training attack over the kept images.
        attack_cost: mean cost of the attacks in training, in forward-equivalents.
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
    seed: int = 0,
    level: float = LEVEL,
) -> list[Comparison]:
    """Compare all settings of a results table, inside each group (study, pool, recipe, checkpoint).

    Gaps are taken seed by seed against the frontiers of the same seed, then averaged.

    Args:
        results: the table, see `puma.tradeoff.results.read_runs`.
        flags: per-image flags by `RunResult.key`; adds the variance of the test images to every interval.
        robust: which column is the robust accuracy.
        baseline: the strategy that differences are taken to.
        draws: bootstrap resamples of the test images, from ``seed``.
        level: nominal coverage of the intervals.

    Raises:
        DataError: the table is broken, see `read_runs` and `resample`.
    """
    comparisons = []
    for group, members in by_group(read_runs(results, robust)).items():
        settings = by_setting(members)
        again = resample({run.key: flags[run.key] for run in members if run.key in flags} if flags else {}, draws, seed)
        base: Runs = next((runs for setting, runs in settings.items() if setting.strategy == baseline), {})
        gaps: dict[Axis, dict[Setting, Gap]] = {a: _gaps(settings, again, a, level) for a in ("clean", "robust")}
        for setting, runs in settings.items():
            other = base if setting.strategy != baseline else {}
            comparisons.append(
                Comparison(
                    group,
                    setting,
                    tuple(sorted(runs)),
                    _mean(runs, "clean", again, level) or Estimate(math.nan, None, None, len(runs)),
                    _mean(runs, "robust", again, level),
                    gaps["clean"][setting],
                    gaps["robust"][setting],
                    _mean(runs, "clean", again, level, other),
                    _mean(runs, "robust", again, level, other),
                    *(
                        _finite_mean([getattr(r, f) for r in runs.values()])
                        for f in ("kept", "mean_eps", "attack_cost")
                    ),
                )
            )
    return comparisons


def frontiers(points: Iterable[tuple[Setting, float, float]]) -> list[Frontier]:
    """The control frontiers of one group and seed; the baseline is a point of each.

    Args:
        points: setting, robust accuracy, clean accuracy; other settings than controls are passed over.
    """
    points = [point for point in points if math.isfinite(point[1])]
    lines = []
    for name in CONTROLS:
        own = [(robust, clean) for setting, robust, clean in points if setting.strategy in (name, BASELINE)]
        lines.append(Frontier(name, [robust for robust, _ in own], [clean for _, clean in own]))
    return lines


def _mean(
    runs: Runs, axis: Axis, resampled: Mapping[RunKey, Resampled], level: float, minus: Runs | None = None
) -> Estimate | None:
    """Mean accuracy over the seeds, or mean difference to another setting over their common seeds."""
    values, again = [], []
    for seed, run in sorted(runs.items()):
        other = None if minus is None else minus.get(seed)
        if minus is not None and other is None:
            continue
        value = getattr(run, axis) - (getattr(other, axis) if other else 0)
        if not math.isfinite(value):
            continue
        values.append(value)
        if run.key in resampled and (other is None or other.key in resampled):
            drawn = getattr(resampled[run.key], axis)
            again.append(drawn - getattr(resampled[other.key], axis) if other else drawn)
    return _interval(values, again, level)


def _gaps(
    settings: Mapping[Setting, Runs], resampled: Mapping[RunKey, Resampled], axis: Axis, level: float
) -> dict[Setting, Gap]:
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
        summary[setting] = Gap(_interval(values[setting], again[setting], level), count, of, note)
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


def _interval(values: Sequence[float], again: Sequence[NDArray[np.float64]], level: float) -> Estimate | None:
    """Mean over seeds; with the variance of the test images where every seed has resamples."""
    if not values:
        return None
    return mean_interval(values, np.stack(again, axis=1) if len(again) == len(values) else None, level)


def _finite_mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True)
class Dominance:
    """Pareto dominance between the settings of one group.

    Args:
        settings: in the order of rows and columns.
        by_mean: bool ``[A, A]``: the row's mean accuracies are both at least the column's and one is higher; over the
            seeds the two have in common.
        seeds: int ``[A, A]``, in how many common seeds the row dominates the column.
        common: int ``[A, A]``, how many seeds the two have in common with both accuracies measured.
    """

    settings: tuple[Setting, ...]
    by_mean: NDArray[np.bool_]
    seeds: NDArray[np.int64]
    common: NDArray[np.int64]

    @property
    def undominated(self) -> list[Setting]:
        """Settings that no other beats by its means."""
        return [setting for column, setting in enumerate(self.settings) if not self.by_mean[:, column].any()]


def dominance(runs: Sequence[RunResult]) -> Dominance:
    """Compare every setting with every other, paired by seed; the runs have to be of one group."""
    settings = by_setting(runs)
    shape = len(settings), len(settings)
    by_mean, seeds, common = np.zeros(shape, bool), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for i, one in enumerate(settings.values()):
        for j, two in enumerate(settings.values()):
            pairs = [(one[seed], two[seed]) for seed in one if seed in two and i != j]
            deltas = np.array([[a.clean - b.clean, a.robust - b.robust] for a, b in pairs]).reshape(-1, 2)
            deltas = deltas[np.isfinite(deltas).all(axis=1)]
            if not len(deltas):
                continue
            mean = deltas.mean(axis=0)
            common[i, j] = len(deltas)
            seeds[i, j] = int(np.count_nonzero((deltas >= 0).all(axis=1) & (deltas > 0).any(axis=1)))
            by_mean[i, j] = bool((mean >= 0).all() and (mean > 0).any())
    return Dominance(tuple(settings), by_mean, seeds, common)
