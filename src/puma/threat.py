"""The threat model: which perturbations are allowed (a norm, a radius eps, and always the box [0, 1])."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
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


@dataclass(frozen=True)
class ThreatModel:
    """All images within ``eps`` of the original in ``norm``, inside the box [0, 1].

    Args:
        norm: ``"Linf"`` or ``"L2"``.
        eps: radius in pixel units of [0, 1] images; finite and not negative.

    >>> ThreatModel.parse("Linf:8/255")
    ThreatModel(norm='Linf', eps=0.03137254901960784)
    >>> print(ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.5))
    Linf:8/255 L2:0.5

    Raises:
        UsageError: unknown norm; eps negative, NaN, infinite, or beyond 1 in Linf.
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        parse_norm(self.norm)
        if not (isinstance(self.eps, (int, float)) and math.isfinite(self.eps) and self.eps >= 0):
            raise UsageError(f"eps {self.eps!r} is not a radius", why="it has to be finite and not negative")
        if self.norm == "Linf" and self.eps > 1:
            raise UsageError(
                f"eps {self.eps:g} in Linf is larger than the whole pixel range [0, 1]",
                fix=f'eps is in pixel units of [0, 1] images: write "{self.eps:g}/255"?',
            )
        object.__setattr__(self, "eps", float(self.eps))

    @classmethod
    def parse(cls, text: str) -> ThreatModel:
        """Read ``"NORM:EPS"``; EPS is a number or a fraction such as ``8/255``.

        Raises:
            UsageError: the text is of another form.
        """
        norm, colon, eps = text.partition(":")
        if not colon:
            raise UsageError(f"threat model {text!r} has no radius", fix='write it as "Linf:8/255" or "L2:0.5"')
        return cls(parse_norm(norm.strip()), parse_eps(eps))

    def __str__(self) -> str:
        return f"{self.norm}:{format_eps(self.eps, self.norm)}"


def parse_eps(text: str) -> float:
    """Read a radius: a number or a fraction.

    >>> parse_eps("0.5"), parse_eps(" 1/4 "), parse_eps("25.5/255")
    (0.5, 0.25, 0.1)

    Raises:
        UsageError: neither a number nor a fraction.
    """
    try:
        above, _, below = text.replace(" ", "").partition("/")
        return float(Fraction(above) / Fraction(below or 1))
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"cannot read {text!r} as a radius", fix='write a number or a fraction, "8/255"') from None


def format_eps(eps: float, norm: Norm) -> str:
    """Print a radius the way the field does: k/255 in Linf where k is short, else a plain number.

    >>> format_eps(8 / 255, "Linf"), format_eps(0.2, "Linf"), format_eps(1.5 / 255, "Linf")
    ('8/255', '51/255', '1.5/255')
    """
    if norm == "Linf":
        return f"{float(f'{eps * 255:.4g}'):g}/255"
    return f"{eps:.6g}"
