"""Statistics of the trade-off between clean and robust accuracy; numpy and scipy only.

`compare` takes a study's results table to gaps, differences and intervals; its parts can be used alone.
"""

from puma.tradeoff.compare import Comparison, Dominance, Gap, compare, dominance, frontiers
from puma.tradeoff.frontier import Frontier, gap, why_not
from puma.tradeoff.intervals import Estimate, Flags, mean_interval, resample, wilson_interval
from puma.tradeoff.needed import Needed, images_needed, random_images_needed, redundant
from puma.tradeoff.results import BASELINE, CONTROLS, Group, RunKey, RunResult, Setting, by_group, by_setting, read_runs

__all__ = [
    "BASELINE",
    "CONTROLS",
    "Comparison",
    "Dominance",
    "Estimate",
    "Flags",
    "Frontier",
    "Gap",
    "Group",
    "Needed",
    "RunKey",
    "RunResult",
    "Setting",
    "by_group",
    "by_setting",
    "compare",
    "dominance",
    "frontiers",
    "gap",
    "images_needed",
    "mean_interval",
    "random_images_needed",
    "read_runs",
    "redundant",
    "resample",
    "why_not",
    "wilson_interval",
]
