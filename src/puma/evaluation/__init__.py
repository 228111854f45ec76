"""Judging a model: clean accuracy on every test image, and accuracy under attack, AutoAttack standard by default.

The attacks are pyautoattack's; what is around them is ours: fixed pieces of the test set, a flag for every image,
resuming, sharing the pieces among processes, counting, and saying what AutoAttack's warnings mean.
"""

from __future__ import annotations

from puma.evaluation.driver import evaluate as evaluate
from puma.evaluation.judge import mislabelled_share as mislabelled_share
from puma.evaluation.result import Evaluation as Evaluation

__all__ = ["Evaluation", "evaluate", "mislabelled_share"]
