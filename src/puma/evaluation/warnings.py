"""AutoAttack's warnings: when each is raised, what it means for the figure, and what to do.

After ``flags_doc.md`` of fra31/auto-attack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple


class AttackWarning(NamedTuple):
    """A part of AutoAttack's message, what it says about the model or the figure, and what to do about it."""

    text: str
    means: str
    do: str


WARNINGS = {
    "randomised": AttackWarning(
        "randomized defense",
        "the model answers the same images differently when asked again; AutoAttack standard overestimates the "
        "robustness of such models",
        "switch dropout and noise off at test time; a randomised defence needs attacks averaged over its randomness",
    ),
    "probabilities": AttackWarning(
        "probability distribution",
        "the model seems to return softmax outputs, on which gradients vanish where it is confident",
        "return logits: remove the softmax at the end of the model",
    ),
    "dynamic": AttackWarning(
        "dynamic defense",
        "the model computes gradients inside its forward pass; attacks that do not take this into account are too weak",
        "remove the optimisation at test time, or attack the model with it in mind",
    ),
    "zero-gradient": AttackWarning(
        "zero gradient",
        "the loss of some attacked images has no gradient at all, so that gradient attacks cannot move them; FAB and "
        "Square may still break them",
        "look for quantisation, saturation or masking in the model; if Square breaks many of them, trust no figure "
        "of gradient attacks",
    ),
    "square-gains": AttackWarning(
        "Square Attack has decreased",
        "Square, which uses no gradients, broke more than 0.2 % of the images after the gradient attacks had given "
        "up: a sign of masked gradients",
        "run more and adaptive attacks before trusting the figure",
    ),
}
"""By the short name that ``evaluation.json`` uses."""
_UNKNOWN = AttackWarning("", "a warning that this version does not know", "read AutoAttack's flags_doc.md")


class WarningRecorder:
    """Takes the place of AutoAttack's logger and counts its warnings."""

    def __init__(self) -> None:
        self.raised: Counter[str] = Counter()

    def warning(self, text: str) -> None:
        """Count a warning by its short name; an unknown text counts under its own words."""
        self.raised[next((flag for flag, known in WARNINGS.items() if known.text in text), text)] += 1

    def info(self, text: str) -> None:
        """Ignore it."""

    debug = info


def explain(raised: Mapping[str, int]) -> list[dict[str, str | int]]:
    """The warnings that were raised, with what they mean and what to do, in the order of `WARNINGS`.

    >>> explain({"probabilities": 1})[0]["do"]
    'return logits: remove the softmax at the end of the model'
    """
    order = [flag for flag in [*WARNINGS, *(set(raised) - set(WARNINGS))] if raised.get(flag)]
    rows = [(flag, WARNINGS.get(flag, _UNKNOWN)) for flag in order]
    return [{"flag": flag, "times": raised[flag], "means": known.means, "do": known.do} for flag, known in rows]
