"""AutoAttack's own warnings: when each is raised, what it means for the figure, and what to do.

After ``flags_doc.md`` of fra31/auto-attack, in our words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """One warning.

    Args:
        name: short name in ``evaluation.json``.
        sign: a piece of AutoAttack's text by which it is recognised.
        means: what it says about the model or the figure.
        do: what to do about it.
    """

    name: str
    sign: str
    means: str
    do: str


FLAGS = (
    Flag(
        "randomised",
        "randomized defense",
        "the model answers the same images differently when asked again; AutoAttack standard overestimates the "
        "robustness of such models",
        "switch dropout and noise off at test time; a randomised defence needs attacks averaged over its randomness",
    ),
    Flag(
        "probabilities",
        "probability distribution",
        "the model seems to return softmax outputs, on which gradients vanish where it is sure of itself",
        "return logits: remove the softmax at the end of the model",
    ),
    Flag(
        "dynamic",
        "dynamic defense",
        "the model computes gradients inside its forward pass; attacks that know nothing of it are too weak",
        "remove the optimisation at test time, or attack the model with it in mind",
    ),
    Flag(
        "zero-gradient",
        "zero gradient",
        "the loss of some attacked images has no gradient at all, so that gradient attacks cannot move them; FAB and "
        "Square may still break them",
        "look for quantisation, saturation or masking in the model; if Square breaks many of them, trust no figure "
        "of gradient attacks",
    ),
    Flag(
        "square-gains",
        "Square Attack has decreased",
        "Square, which uses no gradients, broke more than 0.2 % of the images after the gradient attacks had given "
        "up: a sign of masked gradients",
        "run more and adaptive attacks before trusting the figure",
    ),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}


class FlagRecorder:
    """Takes the place of AutoAttack's logger and counts its warnings."""

    def __init__(self) -> None:
        self.raised: Counter[str] = Counter()

    def warning(self, text: str) -> None:
        """Count a warning by its text; a text we do not know counts under its own words."""
        name = next((flag.name for flag in FLAGS if flag.sign in text), text)
        self.raised[name] += 1

    def info(self, text: str) -> None:
        """Ignore it."""

    def debug(self, text: str) -> None:
        """Ignore it."""


def explain(raised: Mapping[str, int]) -> list[dict[str, str | int]]:
    """The warnings that were raised, with what they mean and what to do, in the order of `FLAGS`.

    >>> explain({"probabilities": 1})[0]["do"]
    'return logits: remove the softmax at the end of the model'
    """
    order: Iterable[str] = [*(name for name in _BY_NAME if raised.get(name)), *(n for n in raised if n not in _BY_NAME)]
    unknown = Flag("", "", "a warning of AutoAttack that this version does not know", "read AutoAttack's flags_doc.md")
    return [
        {
            "flag": name,
            "times": raised[name],
            "means": _BY_NAME.get(name, unknown).means,
            "do": _BY_NAME.get(name, unknown).do,
        }
        for name in order
    ]
