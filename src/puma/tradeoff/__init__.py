"""Statistics of the trade-off between clean and robust accuracy; numpy and scipy only.

`compare` takes a study's results table to gaps, differences and intervals; its parts can be used alone.
"""

from puma.tradeoff.compare import Comparison as Comparison
from puma.tradeoff.compare import Estimate as Estimate
from puma.tradeoff.compare import Frontier as Frontier
from puma.tradeoff.compare import Gap as Gap
from puma.tradeoff.compare import compare as compare
from puma.tradeoff.compare import gap as gap
from puma.tradeoff.compare import mean_interval as mean_interval
from puma.tradeoff.compare import resample as resample
from puma.tradeoff.compare import why_not as why_not
from puma.tradeoff.compare import wilson_interval as wilson_interval
from puma.tradeoff.results import BASELINE as BASELINE
from puma.tradeoff.results import CONTROLS as CONTROLS
from puma.tradeoff.results import Flags as Flags
from puma.tradeoff.results import Group as Group
from puma.tradeoff.results import RunKey as RunKey
from puma.tradeoff.results import RunResult as RunResult
from puma.tradeoff.results import Setting as Setting
from puma.tradeoff.results import read_runs as read_runs
