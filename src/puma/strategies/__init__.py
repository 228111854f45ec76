"""Strategies: rules from margins and other scores to a plan."""

from puma.strategies.plans import drop_label_issues, label_issues, make_plan
from puma.strategies.registry import STRATEGIES, Selection, SelectionContext, Strategy, get_strategy, names, strategy
from puma.strategies.rules import regime

__all__ = [
    "STRATEGIES",
    "Selection",
    "SelectionContext",
    "Strategy",
    "drop_label_issues",
    "get_strategy",
    "label_issues",
    "make_plan",
    "names",
    "regime",
    "strategy",
]
