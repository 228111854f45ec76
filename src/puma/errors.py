"""Errors a user can mend: what is wrong, why, and what to do. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from functools import partial
from numbers import Real
from typing import Any


class PumaError(Exception):
    """A mistake or a condition outside the program: fact, cause (``why``) and remedy (``fix``), each on a line."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        why, fix = (f"\n  {head}: {text}" if text else "" for head, text in (("why", self.why), ("try", self.fix)))
        return f"{self.what}{why}{fix}"

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments must survive a process boundary
        return partial(type(self), why=self.why, fix=self.fix), (self.what,)


class UsageError(PumaError, ValueError):
    """An argument, option or setting that cannot be used (exit code 2)."""

    exit_code = 2


class DataError(PumaError, ValueError):
    """Images, labels, tables or plans that are broken or do not belong together (exit code 3)."""

    exit_code = 3


class ModelError(PumaError, ValueError):
    """Weights or a model that are broken, untrusted or of another architecture (exit code 4)."""

    exit_code = 4


class ResumeError(PumaError):
    """Something is already there that was made with other settings, or is being written now (exit code 5)."""

    exit_code = 5


class BusyError(ResumeError):
    """Another live process is writing the same thing (exit code 5)."""


class StorageError(PumaError, OSError):
    """A path that cannot be written, or a full disk (exit code 6)."""

    exit_code = 6


class CheckError(PumaError):
    """A result that contradicts itself: NaN loss, accuracy that re-evaluation does not confirm (exit code 7)."""

    exit_code = 7


def first_line(error: BaseException) -> str:
    """What an error of another library says, for ``why``; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, with the nearest one that does.

    >>> print(unknown("strategy", "pumma", ["puma", "easy"]))
    unknown strategy 'pumma'
      try: did you mean 'puma'? There are: easy, puma
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    shown = names if len(names) <= 60 else [*difflib.get_close_matches(str(name), names, n=10, cutoff=0), "..."]
    return UsageError(f"unknown {kind} {name!r}", fix=f"{guess}There are: {', '.join(shown)}")


def integer(name: str, value: Any, *, low: int) -> int:
    """Check an integer (numpy's and torch's too) given by the user, or raise `UsageError`."""
    plain = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(plain, int) or isinstance(plain, bool) or not low <= plain < 2**63:
        raise UsageError(f"{name} = {value!r} is not an integer >= {low}", fix=f"choose {name} in that range")
    return plain


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False) -> float:
    """Check a finite number given by the user against a closed range (open at the lower end if ``open_low``)."""
    plain = value.item() if getattr(value, "shape", None) == () else value
    try:
        real = type(plain) is not bool and isinstance(plain, (Real, Decimal)) and math.isfinite(plain)
    except (ValueError, OverflowError):  # a signalling NaN, an integer beyond floats
        real = False
    if not real or not (low < plain if open_low else low <= plain) or not plain <= high:
        limits = f"{'(' if open_low else '['}{low:g}, " + (f"{high:g}]" if math.isfinite(high) else "inf)")
        raise UsageError(f"{name} = {value!r} is not a number in {limits}", fix=f"choose {name} in that range")
    return float(plain)


def printable(text: object) -> str:
    """``text`` for a terminal: control, bidirectional and other invisible characters but line ends become escapes.

    >>> printable("a\\x1b[31m\\u202eb")
    'a\\\\x1b[31m\\\\u202eb'
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    kinds = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) not in kinds else ascii(character)[1:-1]
        for character in text
    )
