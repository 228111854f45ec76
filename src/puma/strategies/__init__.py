"""Strategies: rules from margins and other scores to a plan. One small file each; see `puma.strategies.registry`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from puma.strategies.make import make_plan
from puma.strategies.registry import STRATEGIES, Strategy, get_strategy, names

for _module in iter_modules(__path__):  # every file in this folder is imported, so that a new one registers itself
    import_module(f"{__name__}.{_module.name}")

__all__ = ["STRATEGIES", "Strategy", "get_strategy", "make_plan", "names"]
