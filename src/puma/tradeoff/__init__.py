"""Statistics of the trade-off between clean and robust accuracy; numpy and scipy only.

`compare` takes a study's results table to gaps, differences and intervals; the parts it is made of stand alone.
"""

from __future__ import annotations

from puma.tradeoff.arms import Arm, Cell, CellKey, Setting, by_arm, by_setting, read_cells
from puma.tradeoff.bootstrap import Flags, resample
from puma.tradeoff.compare import Comparison, Gap, compare, frontiers
from puma.tradeoff.dominance import Dominance, dominance
from puma.tradeoff.frontier import Frontier
from puma.tradeoff.gap import gap, why_not
from puma.tradeoff.intervals import Estimate, mean_interval, wilson_interval
from puma.tradeoff.needed import Needed, images_needed, random_images_needed, redundant

__all__ = [
    "Arm",
    "Cell",
    "CellKey",
    "Comparison",
    "Dominance",
    "Estimate",
    "Flags",
    "Frontier",
    "Gap",
    "Needed",
    "Setting",
    "by_arm",
    "by_setting",
    "compare",
    "dominance",
    "frontiers",
    "gap",
    "images_needed",
    "mean_interval",
    "random_images_needed",
    "read_cells",
    "redundant",
    "resample",
    "why_not",
    "wilson_interval",
]
