"""PUMA: adversarial training with less data (arXiv 2405.06298).

Measure every training image's margin, prune the images of highest margin, lower eps on those of lowest margin, and
train adversarially on what is left. The names below are the front door; each is imported when first used,
so that ``import puma`` and ``puma --help`` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puma.attacks.deepfool import deepfool as deepfool
    from puma.attacks.pgd import pgd as pgd
    from puma.data.load import load_dataset as load_dataset
    from puma.data.pool import PlannedDataset as PlannedDataset
    from puma.data.pool import Pool as Pool
    from puma.evaluation import evaluate as evaluate
    from puma.margins import MarginTable as MarginTable
    from puma.models.checks import TwoLogits as TwoLogits
    from puma.models.networks import build_model as build_model
    from puma.models.weights import load_model as load_model
    from puma.plan import Plan as Plan
    from puma.scoring import score_margins as score_margins
    from puma.strategies import make_plan as make_plan
    from puma.threat import ThreatModel as ThreatModel
    from puma.training.loop import train as train

__version__ = "0.1.0"
_FRONT_DOOR = {
    "MarginTable": "puma.margins",
    "Plan": "puma.plan",
    "PlannedDataset": "puma.data.pool",
    "Pool": "puma.data.pool",
    "ThreatModel": "puma.threat",
    "TwoLogits": "puma.models.checks",
    "build_model": "puma.models.networks",
    "deepfool": "puma.attacks.deepfool",
    "evaluate": "puma.evaluation",
    "load_dataset": "puma.data.load",
    "load_model": "puma.models.weights",
    "make_plan": "puma.strategies",
    "pgd": "puma.attacks.pgd",
    "score_margins": "puma.scoring",
    "train": "puma.training.loop",
}
__all__ = [*_FRONT_DOOR, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'puma' has no attribute {name!r}")
    value = getattr(import_module(_FRONT_DOOR[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
