"""Sharing a model: a folder for RobustBench or for the Hugging Face Hub, made offline and proved by a fresh process.

Either folder holds the weights, the network as one self-contained file (``model.py``, torch only) and a model card.
"""

from __future__ import annotations

from puma.export.card import Paper as Paper
from puma.export.claim import Claim as Claim
from puma.export.hub import export_hub as export_hub
from puma.export.robustbench import export_robustbench as export_robustbench

__all__ = ["Claim", "Paper", "export_hub", "export_robustbench"]
