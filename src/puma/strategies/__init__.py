"""Strategies: rules from margins and other scores to a plan."""

from __future__ import annotations

from puma.strategies import rules as _rules
from puma.strategies import selectors as _selectors
from puma.strategies.plans import drop_label_issues, label_issues, make_plan, regime
from puma.strategies.registry import STRATEGIES, Selection, SelectionContext, Strategy, get_strategy, names, strategy

_ = (_rules, _selectors)  # importing a module registers its strategies

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
