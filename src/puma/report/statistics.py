"""A study's arms with their statistics, as the report's sections take them; the statistics are `puma.tradeoff`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from puma.report.flags import read_flags
from puma.report.materials import Materials
from puma.report.results import Arm
from puma.tradeoff import BASELINE, CONTROLS, Comparison, Estimate, Frontier, Gap, compare, wilson_interval

DIALS = dict(zip(CONTROLS, ("scale", "beta"), strict=True))
"""The parameter that each control's dial turns."""

DRAWS = 500


@dataclass(frozen=True)
class Compared:
    """One arm and what the statistics say about it."""

    arm: Arm
    found: Comparison

    @property
    def clean(self) -> Estimate:
        """Clean accuracy."""
        return self.found.clean

    @property
    def robust(self) -> Estimate:
        """Robust accuracy; with one seed and no flags, its interval over test images (Wilson)."""
        robust = self.found.robust
        if robust is None:
            raise ValueError(f"{self.arm.label} was not attacked")
        if robust.seeds == 1 and robust.low is None:
            low, high = wilson_interval(robust.value, self.arm.first.n_test)
            return replace(robust, low=low, high=high)
        return robust


@dataclass(frozen=True)
class Statistics:
    """The arms of one pool and recipe at one checkpoint.

    Args:
        column: ``"robust_accuracy"`` (AutoAttack standard) or ``"apgd_accuracy"``.
        arms: the attacked arms.
        images: whether the variance of the test images is in all intervals.
    """

    column: str
    arms: list[Compared]
    images: bool

    @property
    def one_seed(self) -> bool:
        """Whether no arm has a second seed."""
        return all(len(entry.arm.rows) == 1 for entry in self.arms)

    @property
    def judged(self) -> list[Compared]:
        """The arms that are compared with the control frontiers."""
        return [entry for entry in self.arms if not entry.found.setting.is_control]

    @property
    def controls(self) -> list[str]:
        """Names of the dials that were turned."""
        return [name for name in CONTROLS if any(entry.arm.strategy == name for entry in self.arms)]

    def mean_frontiers(self) -> list[Frontier]:
        """The control frontiers through the means over seeds, for the picture."""
        lines = []
        for name in self.controls:
            points = [entry for entry in self.arms if entry.arm.strategy in (name, BASELINE)]
            lines.append(Frontier(name, [p.robust.value for p in points], [p.clean.value for p in points]))
        return lines


def make_statistics(materials: Materials, arms: Sequence[Arm], column: str) -> Statistics:
    """Compare the arms of one pool and recipe; those that were not attacked are left out."""
    attacked = [arm for arm in arms if arm.mean(column) is not None]
    rows = [row for arm in attacked for row in arm.rows]
    flags = read_flags(materials, rows, column)
    found = compare([row.to_dict() for row in rows], flags, robust=column, draws=DRAWS)
    by_key = {(entry.group, entry.setting): entry for entry in found}
    return Statistics(column, [Compared(arm, by_key[arm.first.key[:2]]) for arm in attacked], bool(flags))


def verdict(gap: Gap) -> str:
    """A gap in words: on which side of the controls its interval lies."""
    if gap.estimate is None:
        return "not comparable"
    low, high = gap.estimate.low, gap.estimate.high
    if low is None or high is None:
        return "no interval"
    if low > 0:
        return "above"
    return "below" if high < 0 else "no difference shown"
