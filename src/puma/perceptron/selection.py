"""The strategies on one training set of the laboratory: which rows are kept, and at what attack norm."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puma.errors import UsageError, unknown
from puma.perceptron.bridge import suggested_c
from puma.perceptron.gaussian import Array

_PARAMETERS: dict[str, tuple[float | str, ...]] = {
    "none": (),
    "random": (),
    "difficult": (),
    "easy": (),
    "puma": (0.5,),
    "puma-plus": ("auto", 0.2),
    "cap-only": (0.5,),
    "uniform-eps": (0.5,),
}
WHOLE = ("none", "cap-only", "uniform-eps")
"""Strategies that keep every row."""


@dataclass(frozen=True)
class Strategy:
    """A strategy with its parameters; the same rules as `puma.strategies`, without classes and sources.

    ``none``: all rows, full eps. ``random``: a random share. ``difficult`` / ``easy``: the lowest / highest margins go.
    ``puma(c)``: the highest margins go, ``eps_i = min(eps, c max(m_i, 0))``. ``puma-plus(c, max_misclassified)``: first
    the most negative rows beyond that share of the kept set go, then the highest margins; ``c`` may be ``auto``.
    ``cap-only(c)``: puma's eps on all rows. ``uniform-eps(q)``: all rows at ``q`` times eps.

    Args:
        name: one of the above.
        parameters: in that order.

    >>> Strategy.parse("puma"), str(Strategy.parse("puma-plus(auto, 0.1)"))
    (Strategy(name='puma', parameters=(0.5,)), 'puma-plus(auto, 0.1)')
    """

    name: str
    parameters: tuple[float | str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Read ``name`` or ``name(parameter, ...)``; what is left out takes its default.

        Raises:
            UsageError: an unknown name, too many parameters, or one out of its range.
        """
        match = re.fullmatch(r"\s*([a-z-]+)\s*(?:\((.*)\))?\s*", text)
        name = match[1] if match else text
        if name not in _PARAMETERS:
            raise unknown("strategy", name, _PARAMETERS)
        given = [part.strip() for part in (match[2] or "").split(",")] if match and match[2] else []
        defaults = _PARAMETERS[name]
        if len(given) > len(defaults):
            raise UsageError(f"strategy {text!r} has too many parameters", fix=f"{name} takes {len(defaults)}")
        values = tuple(_number(part, text) for part in given) + defaults[len(given) :]
        if "auto" in values[1:] or (values[:1] == ("auto",) and name != "puma-plus"):
            raise UsageError(f"strategy {text!r}: 'auto' is only for the c of puma-plus")
        return cls(name, values)

    def __str__(self) -> str:
        if self.parameters == _PARAMETERS[self.name]:
            return self.name
        values = (value if isinstance(value, str) else f"{value:g}" for value in self.parameters)
        return f"{self.name}({', '.join(values)})"

    def cap(self, misclassified: float, below_eps: float, keep: float) -> float:
        """The factor ``c`` of the cap; infinite for strategies without one.

        Args:
            misclassified: share of rows with a negative margin, before pruning.
            below_eps: share with a margin from 0 to eps, before pruning.
            keep: kept share.
        """
        if self.name not in ("puma", "puma-plus", "cap-only"):
            return float("inf")
        c = self.parameters[0]
        return suggested_c(misclassified, below_eps, keep) if isinstance(c, str) else c

    def select(
        self, margin: Array, eps: float, keep: float, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], Array]:
        """Choose rows and their attack norms.

        Args:
            margin: signed margins ``[n]`` to the probe.
            eps: attack norm.
            keep: kept share; strategies that keep everything ignore it.
            rng: for ``random``.

        Returns:
            Indices of the kept rows, ascending, and their attack norms.
        """
        n = len(margin)
        kept = n if self.name in WHOLE else max(1, round(keep * n))
        start = {"difficult": n - kept, "puma-plus": self._hopeless(margin, kept)}.get(self.name, 0)
        order = rng.permutation(n) if self.name == "random" else np.argsort(margin, kind="stable")
        rows = np.sort(order[start : start + kept])
        if self.name == "uniform-eps":
            return rows, np.full(kept, eps * float(self.parameters[0]))
        c = self.cap(float(np.mean(margin < 0)), float(np.mean((margin > 0) & (margin < eps))), kept / n)
        if np.isinf(c):
            return rows, np.full(kept, eps)
        return rows, np.minimum(eps, c * np.maximum(margin[rows], 0))

    def _hopeless(self, margin: Array, kept: int) -> int:
        """How many of the most negative rows puma-plus drops: those beyond its share, never beyond the budget."""
        if self.name != "puma-plus":
            return 0
        allowed = int(float(self.parameters[1]) * kept)
        return min(len(margin) - kept, max(0, int((margin < 0).sum()) - allowed))


def _number(part: str, text: str) -> float | str:
    """A parameter: ``auto``, or a number that is not negative."""
    if part == "auto":
        return part
    try:
        value = float(part)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"strategy {text!r}: cannot use the parameter {part!r}", fix="write a number, 0 or more")
    return value
