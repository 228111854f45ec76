"""Statistics of the trade-off between clean and robust accuracy; numpy and scipy only."""

from __future__ import annotations

from puma.tradeoff.frontier import Frontier
from puma.tradeoff.gap import gap, why_not
from puma.tradeoff.intervals import Estimate, mean_interval, wilson_interval

__all__ = ["Estimate", "Frontier", "gap", "mean_interval", "why_not", "wilson_interval"]
