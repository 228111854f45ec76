"""The two norms, spelt once: ``"Linf"`` and ``"L2"``."""

from __future__ import annotations

from typing import Literal, get_args

from puma.errors import UsageError

Norm = Literal["Linf", "L2"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def parse_norm(text: str) -> Norm:
    """Return the norm called ``text``.

    >>> parse_norm("Linf")
    'Linf'

    Raises:
        UsageError: any other spelling.
    """
    if text not in NORMS:
        raise UsageError(f"unknown norm {text!r}", fix='use "Linf" or "L2"')
    return text
