"""Strategies: rules from margins and other scores to a plan."""

from puma.strategies.plans import make_plan
from puma.strategies.registry import STRATEGIES, Selection, SelectionContext, Strategy, get_strategy, names, strategy
from puma.strategies.rules import regime

__all__ = [
    "STRATEGIES",
    "Selection",
    "SelectionContext",
    "Strategy",
    "get_strategy",
    "make_plan",
    "names",
    "regime",
    "strategy",
]
