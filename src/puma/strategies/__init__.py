"""Strategies: rules from margins and other scores to a plan."""

from __future__ import annotations

from puma.strategies import controls as _controls
from puma.strategies import rules as _rules
from puma.strategies import selectors as _selectors
from puma.strategies.plans import drop_label_issues, label_issues, make_plan
from puma.strategies.registry import STRATEGIES, Strategy, get_strategy, names

_ = (_controls, _rules, _selectors)  # importing a module registers its strategies

__all__ = ["STRATEGIES", "Strategy", "drop_label_issues", "get_strategy", "label_issues", "make_plan", "names"]
