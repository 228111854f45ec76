"""Clean accuracy on every test image, and accuracy under attack: AutoAttack standard by default.

The attacks are pyautoattack's; the driver around them is ours, because the library's own resuming does not survive a
restart: fixed shards of the test set, a flag for every image, resuming, sharing shards among processes, cost.
"""

from puma.evaluation.attacks import MislabelledShares, mislabelled_shares
from puma.evaluation.driver import Cost, estimate_cost, evaluate
from puma.evaluation.result import Evaluation

__all__ = ["Cost", "Evaluation", "MislabelledShares", "estimate_cost", "evaluate", "mislabelled_shares"]
