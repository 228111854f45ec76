"""From a study's results to its statistics: each arm's accuracies, gap to the controls, difference to the baseline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from puma.tradeoff.arms import (
    BASELINE,
    CONTROLS,
    Arm,
    Cell,
    CellKey,
    Results,
    Setting,
    by_arm,
    by_setting,
    read_cells,
)
from puma.tradeoff.bootstrap import DRAWS, Flags, Resampled, resample
from puma.tradeoff.frontier import Frontier
from puma.tradeoff.gap import Axis, gap, why_not
from puma.tradeoff.intervals import LEVEL, Estimate, mean_interval


@dataclass(frozen=True)
class Gap:
    """An arm's mean distance above the higher control frontier.

    Args:
        estimate: mean over the seeds that could be compared, None if none could.
        seeds: how many of the arm's seeds could be compared.
        of: how many seeds the arm has.
        decided_by: names of the frontiers that were the higher one, most frequent first.
        note: why a seed (or all) could not be compared; empty if all could.
    """

    estimate: Estimate | None
    seeds: int
    of: int
    decided_by: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """One arm of one setting.

    Args:
        setting: what was held fixed.
        arm: strategy, parameters, prune fraction.
        seeds: the seeds that have finished.
        clean: clean accuracy.
        robust: robust accuracy, None where it was not measured.
        clean_gap: clean accuracy above the controls at equal robust accuracy: the headline.
        robust_gap: robust accuracy above the controls at equal clean accuracy.
        clean_difference: clean accuracy minus that of the baseline, paired by seed; None without common seeds.
        robust_difference: the same for robust accuracy.
        kept: mean number of images trained on.
        mean_eps: mean attack radius over the kept images.
        attack_cost: mean cost of the attacks in training, in forward-equivalents.
    """

    setting: Setting
    arm: Arm
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
    flags: Mapping[CellKey, Flags] | None = None,
    *,
    robust: str = "robust_accuracy",
    baseline: str = BASELINE,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Comparison]:
    """All arms of a results table, compared inside each setting (study, pool, recipe, checkpoint).

    Gaps are taken seed by seed against the frontiers of the same seed, then averaged.

    Args:
        results: the table, see `puma.tradeoff.arms.read_cells`.
        flags: per-image flags by `Cell.key`; adds the variance of the test images to every interval.
        robust: which column is the robust accuracy.
        baseline: the strategy that differences are taken to.
        draws: bootstrap resamples of the test images.
        seed: of the resamples.
        level: nominal coverage of the intervals.

    Raises:
        DataError: the table is broken, see `read_cells` and `resample`.
    """
    found = []
    for setting, cells in by_setting(read_cells(results, robust)).items():
        arms = by_arm(cells)
        mine = {cell.key: flags[cell.key] for cell in cells if cell.key in flags} if flags else {}
        table = _Setting(arms, resample(mine, draws, seed), level)
        base = next((runs for arm, runs in arms.items() if arm.strategy == baseline), {})
        for arm, runs in arms.items():
            found.append(
                Comparison(
                    setting,
                    arm,
                    tuple(sorted(runs)),
                    table.mean(runs, "clean") or Estimate(math.nan, None, None, len(runs)),
                    table.mean(runs, "robust"),
                    table.gap(arm, "clean"),
                    table.gap(arm, "robust"),
                    table.mean(runs, "clean", base) if arm.strategy != baseline else None,
                    table.mean(runs, "robust", base) if arm.strategy != baseline else None,
                    *(
                        _mean([getattr(run, fact) for run in runs.values()])
                        for fact in ("kept", "mean_eps", "attack_cost")
                    ),
                )
            )
    return found


def frontiers(runs: Sequence[Cell]) -> list[Frontier]:
    """The control frontiers of some cells of one setting and seed; the baseline is a point of both."""
    found = []
    for name in CONTROLS:
        points = [cell for cell in runs if cell.arm.strategy in (name, BASELINE) and math.isfinite(cell.robust)]
        found.append(Frontier(name, [cell.robust for cell in points], [cell.clean for cell in points]))
    return found


@dataclass(frozen=True)
class _Setting:
    """The arms of one setting with their resampled accuracies, and the three means that are taken over their seeds."""

    arms: dict[Arm, dict[int, Cell]]
    resampled: dict[CellKey, Resampled]
    level: float
    cache: dict[tuple[int, Axis], dict[Arm, NDArray[np.float64]]] = field(default_factory=dict)

    def mean(self, runs: Mapping[int, Cell], axis: Axis, minus: Mapping[int, Cell] | None = None) -> Estimate | None:
        """Mean accuracy over the seeds, or mean difference to another arm over their common seeds."""
        pairs = [(run, None if minus is None else minus.get(seed)) for seed, run in sorted(runs.items())]
        pairs = [(run, other) for run, other in pairs if minus is None or other is not None]
        values = [getattr(run, axis) - (getattr(other, axis) if other else 0) for run, other in pairs]
        usable = [i for i, value in enumerate(values) if math.isfinite(value)]
        if not usable:
            return None
        again = None
        if all(cell.key in self.resampled for i in usable for cell in pairs[i] if cell):
            again = np.stack([self._again(*pairs[i], axis) for i in usable], axis=1)
        return mean_interval([values[i] for i in usable], again, self.level)

    def gap(self, arm: Arm, axis: Axis) -> Gap:
        """Mean gap over the seeds that can be compared."""
        runs = self.arms[arm]
        if arm.control:
            return Gap(None, 0, len(runs), note="is itself a point of the control frontiers")
        values, again, notes, deciders = [], [], [], Counter[str]()
        for seed, run in sorted(runs.items()):
            controls = [cells[seed] for other, cells in self.arms.items() if other.control and seed in cells]
            dials = frontiers(controls)
            value = float(gap(run.robust, run.clean, dials, axis))
            if math.isnan(value):
                notes.append(why_not(run.robust, run.clean, dials, axis))
                continue
            values.append(value)
            deciders.update(dial.name for dial in dials if gap(run.robust, run.clean, [dial], axis) == value)
            if (drawn := self._gaps_again(seed, axis).get(arm)) is not None:
                again.append(drawn)
        note = ""
        if notes:
            note = notes[0] if not values else f"{len(values)} of {len(runs)} seeds; for the others {notes[0]}"
        if not values:
            return Gap(None, 0, len(runs), note=note)
        images = np.stack(again, axis=1) if len(again) == len(values) else None
        estimate = mean_interval(values, images, self.level)
        return Gap(estimate, len(values), len(runs), tuple(name for name, _ in deciders.most_common()), note)

    def _again(self, run: Cell, other: Cell | None, axis: Axis) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = getattr(self.resampled[run.key], axis)
        return drawn if other is None else drawn - getattr(self.resampled[other.key], axis)

    def _gaps_again(self, seed: int, axis: Axis) -> dict[Arm, NDArray[np.float64]]:
        """Gaps of all arms under every resample of the test images, float64 ``[B]``; frontiers are built once."""
        if (seed, axis) not in self.cache:
            runs = {arm: cells[seed] for arm, cells in self.arms.items() if seed in cells}
            drawn = {arm: self.resampled[run.key] for arm, run in runs.items() if run.key in self.resampled}
            missing = any(arm.control and arm not in drawn for arm in runs)
            judged = [arm for arm in drawn if not arm.control]
            self.cache[seed, axis] = {} if missing or not judged else self._gaps_of(drawn, judged, axis)
        return self.cache[seed, axis]

    def _gaps_of(
        self, drawn: Mapping[Arm, Resampled], judged: Sequence[Arm], axis: Axis
    ) -> dict[Arm, NDArray[np.float64]]:
        dials = []
        for name in CONTROLS:
            points = [drawn[arm] for arm in drawn if arm.strategy in (name, BASELINE)]
            if points := [point for point in points if np.isfinite(point.robust).all()]:
                dials.append((name, _columns(points, "robust"), _columns(points, "clean")))
        robust, clean = (_columns([drawn[arm] for arm in judged], accuracy) for accuracy in ("robust", "clean"))
        gaps = np.empty_like(clean)
        for b in range(len(gaps)):
            gaps[b] = gap(robust[b], clean[b], [Frontier(name, r[b], c[b]) for name, r, c in dials], axis)
        return {arm: gaps[:, column] for column, arm in enumerate(judged)}


def _columns(points: Sequence[Resampled], accuracy: str) -> NDArray[np.float64]:
    """One accuracy of several cells side by side, ``[B, P]``."""
    return np.stack([getattr(point, accuracy) for point in points], axis=1)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan
