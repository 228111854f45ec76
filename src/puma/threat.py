"""The threat model: which perturbations are allowed (a norm, a radius eps, and always the box [0, 1])."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from puma.errors import UsageError, number

Norm = Literal["Linf", "L2"]
_SPELLINGS: dict[str, Norm] = {"linf": "Linf", "inf": "Linf", "linfty": "Linf", "l∞": "Linf", "l2": "L2"}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"


def parse_norm(text: str) -> Norm:
    """Return the norm called ``text`` (else `UsageError`); capitals, ``_`` and ``-`` do not matter."""
    norm = _SPELLINGS.get(re.sub(r"[\s_-]", "", str(text)).lower())
    if norm is None:
        raise UsageError(f"unknown norm {text!r}", fix='use "Linf" or "L2"')
    return norm


@dataclass(frozen=True)
class ThreatModel:
    """All images within ``eps`` of the original in ``norm`` (``"Linf"`` or ``"L2"``), inside the box [0, 1].

    ``eps`` is in pixel units of [0, 1] images. `UsageError` if it is negative, NaN, infinite, or beyond 1 in Linf.

    Examples:
        >>> print(ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.5))  # reading it gives the same threat model
        Linf:8/255 L2:0.5
    """

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", parse_norm(self.norm))
        object.__setattr__(self, "eps", number("eps", self.eps))
        if self.norm == "Linf" and self.eps > 1:
            fix = f'eps is in pixel units of [0, 1] images: write "{self.eps:g}/255"?'
            raise UsageError(f"eps {self.eps:g} in Linf is larger than the whole pixel range [0, 1]", fix=fix)

    @classmethod
    def parse(cls, text: str | ThreatModel) -> ThreatModel:
        """Read ``"NORM:EPS"`` (else `UsageError`), EPS a number or a fraction; a threat model is returned as it is."""
        if isinstance(text, ThreatModel):
            return text
        first, colon, second = (part.strip() for part in str(text).partition(":"))
        if not colon:
            eps = first if re.fullmatch(f"{_NUMBER}(/{_NUMBER})?", first) else "8/255"
            missing = "norm" if eps == first else "eps"
            norm = _SPELLINGS.get(re.sub(r"[\s_-]", "", first).lower(), "Linf")
            fix = f'write it as "{norm}:{"0.5" if norm == "L2" else eps}"'
            raise UsageError(f"threat model {text!r} has no {missing}", fix=fix)
        return cls(parse_norm(first), parse_eps(second))

    def __str__(self) -> str:
        shortest = (f"{self.eps:.6g}", f"{self.eps * 255:.6g}/255", repr(self.eps))
        return f"{self.norm}:{next(text for text in shortest if parse_eps(text) == self.eps)}"


def parse_eps(text: str) -> float:
    """Read an eps, a number or a fraction, or raise `UsageError`.

    >>> parse_eps("0.5"), parse_eps(" 1/4 "), parse_eps("25.5/255")
    (0.5, 0.25, 0.1)
    """
    plain = text.replace(" ", "")
    try:
        if len(plain) > 80 or not re.fullmatch(f"{_NUMBER}(/{_NUMBER})?", plain):
            raise ValueError
        above, _, below = plain.partition("/")
        return float(Fraction(above) / Fraction(below or 1))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UsageError(f"cannot read {text[:80]!r} as eps", fix='write a number or a fraction, "8/255"') from None


def format_eps(eps: float, norm: Norm) -> str:
    """Print an eps the way the field does: a short decimal as it is, else about k/255 in Linf.

    >>> format_eps(8 / 255, "Linf"), format_eps(0.2, "Linf"), format_eps(0.123456, "L2")
    ('8/255', '0.2', '0.123456')
    """
    if norm == "Linf" and float(f"{eps:.3g}") != eps:
        return f"{float(f'{eps * 255:.4g}'):g}/255"
    return f"{eps:.6g}"
