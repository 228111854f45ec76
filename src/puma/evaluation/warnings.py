"""AutoAttack's warnings: when each is raised, what it means for the figure, and what to do.

After ``flags_doc.md`` of fra31/auto-attack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple


class AttackWarning(NamedTuple):
    """One warning.

    Args:
        flag: short name in ``evaluation.json``.
        text: part of AutoAttack's message by which it is recognised.
        means: what it says about the model or the figure.
        do: what to do about it.
    """

    flag: str
    text: str
    means: str
    do: str


WARNINGS = (
    AttackWarning(
        "randomised",
        "randomized defense",
        "the model answers the same images differently when asked again; AutoAttack standard overestimates the "
        "robustness of such models",
        "switch dropout and noise off at test time; a randomised defence needs attacks averaged over its randomness",
    ),
    AttackWarning(
        "probabilities",
        "probability distribution",
        "the model seems to return softmax outputs, on which gradients vanish where it is sure of itself",
        "return logits: remove the softmax at the end of the model",
    ),
    AttackWarning(
        "dynamic",
        "dynamic defense",
        "the model computes gradients inside its forward pass; attacks that know nothing of it are too weak",
        "remove the optimisation at test time, or attack the model with it in mind",
    ),
    AttackWarning(
        "zero-gradient",
        "zero gradient",
        "the loss of some attacked images has no gradient at all, so that gradient attacks cannot move them; FAB and "
        "Square may still break them",
        "look for quantisation, saturation or masking in the model; if Square breaks many of them, trust no figure "
        "of gradient attacks",
    ),
    AttackWarning(
        "square-gains",
        "Square Attack has decreased",
        "Square, which uses no gradients, broke more than 0.2 % of the images after the gradient attacks had given "
        "up: a sign of masked gradients",
        "run more and adaptive attacks before trusting the figure",
    ),
)


class WarningRecorder:
    """Takes the place of AutoAttack's logger and counts its warnings."""

    def __init__(self) -> None:
        self.raised: Counter[str] = Counter()

    def warning(self, text: str) -> None:
        """Count a warning by its flag; an unknown text counts under its own words."""
        self.raised[next((known.flag for known in WARNINGS if known.text in text), text)] += 1

    def info(self, text: str) -> None:
        """Ignore it."""

    def debug(self, text: str) -> None:
        """Ignore it."""


def explain(raised: Mapping[str, int]) -> list[dict[str, str | int]]:
    """The warnings that were raised, with what they mean and what to do, in the order of `WARNINGS`.

    >>> explain({"probabilities": 1})[0]["do"]
    'return logits: remove the softmax at the end of the model'
    """
    known = {each.flag: each for each in WARNINGS}
    new = AttackWarning(
        "", "", "a warning of AutoAttack that this version does not know", "read AutoAttack's flags_doc.md"
    )
    order = [flag for flag in [*known, *(set(raised) - set(known))] if raised.get(flag)]
    return [
        {"flag": flag, "times": raised[flag], "means": known.get(flag, new).means, "do": known.get(flag, new).do}
        for flag in order
    ]
