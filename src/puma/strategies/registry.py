"""The registry of strategies. Decorating one function with `strategy` adds one.

```python
@strategy("loudest", prunes="low loudness", source="our own", needs=("loudness",))
def loudest(context: SelectionContext, *, power: float = 1.0) -> Selection:
    \"\"\"Keep the loudest images, full eps.\"\"\"
    return Selection(context.drop(context.score("loudness") ** power, "low"), context.uniform_eps())
```
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from puma.errors import UsageError, unknown
from puma.strategies.context import Selection

Rule = Callable[..., Selection]
STRATEGIES: dict[str, Strategy] = {}


@dataclass(frozen=True)
class Strategy:
    """A rule and its properties.

    Args:
        name: as users write it, ``puma-plus``.
        rule: ``rule(context, **params) -> Selection``; its keyword-only arguments are the parameters.
        prunes: which end is removed, in a few words; empty if it removes nothing whatever prune_fraction is.
        source: arXiv id and section, or "our own".
        compares: it compares margins with eps, so the table has to be in the threat model's norm.
        control: it isolates a mechanism and is not meant for use.
        beyond_eps: it may give an eps above the threat model's.
        needs: what it reads beyond labels: "margin", a score's column, or "features" (a parameter).
    """

    name: str
    rule: Rule
    prunes: str
    source: str
    compares: bool = False
    control: bool = False
    beyond_eps: bool = False
    needs: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the rule's docstring."""
        return (inspect.getdoc(self.rule) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter names and their defaults."""
        signature = inspect.signature(self.rule).parameters.values()
        return {item.name: item.default for item in signature if item.kind is item.KEYWORD_ONLY}

    def resolve(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters: those given, and the defaults of the others.

        Raises:
            UsageError: a parameter that the strategy does not have (with the nearest it has), or a missing one.
        """
        for name in params:
            if not self.parameters:
                raise UsageError(f"strategy {self.name!r} has no parameters, {name!r} was given")
            if name not in self.parameters:
                raise unknown(f"parameter of {self.name}:", name, self.parameters)
        resolved = {**self.parameters, **params}
        missing = [name for name, value in resolved.items() if value is inspect.Parameter.empty]
        if missing:
            raise UsageError(
                f"strategy {self.name!r} needs {' and '.join(missing)}", fix=f"add `--param {missing[0]}=VALUE`"
            )
        return resolved


def strategy(
    name: str,
    *,
    prunes: str,
    source: str,
    compares: bool = False,
    control: bool = False,
    beyond_eps: bool = False,
    needs: tuple[str, ...] = (),
) -> Callable[[Rule], Rule]:
    """Register the decorated rule under ``name``; the arguments are those of `Strategy`."""

    def register(rule: Rule) -> Rule:
        STRATEGIES[name] = Strategy(name, rule, prunes, source, compares, control, beyond_eps, needs)
        return rule

    return register


def names() -> list[str]:
    """All strategies, in alphabetical order."""
    return sorted(STRATEGIES)


def get_strategy(name: str) -> Strategy:
    """The strategy called ``name``.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    return STRATEGIES[name]
