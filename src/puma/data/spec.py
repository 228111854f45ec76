"""Spec strings: ``PATH?resize=16&subset=5000&seed=0`` names a source so that another process can open the same one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from puma.errors import UsageError, unknown

Verify = Literal["free", "full"]


@dataclass(frozen=True)
class Options:
    """What may be asked of any source.

    Args:
        resize: scale every image to this side, in pixels.
        channels: 3 turns greyscale into RGB; 1 only states what is there.
        classes: keep only these classes, by name or number; they are renumbered in this order.
        subset: keep this many images: stratified and seeded, never a prefix.
        seed: of the subset.
        split: which of several splits in a folder of Parquet files.
        labels: the ``.npy`` file of labels that belongs to an ``.npy`` of images.
        verify: ``"full"`` reads every byte once and compares checksums.
    """

    resize: int | None = None
    channels: int | None = None
    classes: tuple[str, ...] | None = None
    subset: int | None = None
    seed: int = 0
    split: str | None = None
    labels: str | None = None
    verify: Verify = "free"

    def __post_init__(self) -> None:
        if self.resize is not None and not 1 <= self.resize <= 4096:
            raise UsageError(f"resize={self.resize} is not a side in 1..4096")
        if self.channels not in (None, 1, 3):
            raise UsageError(f"channels={self.channels}", why="1 (grey) or 3 (RGB) are understood")
        if self.subset is not None and self.subset < 1:
            raise UsageError(f"subset={self.subset} keeps no image")
        if self.classes is not None and (not self.classes or len(set(self.classes)) != len(self.classes)):
            raise UsageError(f"classes={','.join(self.classes)} is empty or names a class twice")
        if self.verify not in ("free", "full"):
            raise unknown("way to verify", self.verify, ("free", "full"))

    def text(self) -> str:
        """The options that differ from their defaults, as they stand after the ``?``."""
        pairs = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                pairs.append(f"{item.name}={','.join(value) if isinstance(value, tuple) else value}")
        return "&".join(pairs)


_NAMES = tuple(item.name for item in fields(Options))
_NUMBERS = ("resize", "channels", "subset", "seed")


def parse_spec(text: str) -> tuple[list[str], dict[str, Any]]:
    """Split a spec into its paths (joined by ``|``) and its options.

    >>> parse_spec("a.npz|b.npz?subset=100&classes=cat,dog")
    (['a.npz', 'b.npz'], {'subset': 100, 'classes': ('cat', 'dog')})

    Raises:
        UsageError: unknown option, an option twice, or a value that is no number where one is needed.
    """
    places, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        name, equals, value = pair.partition("=")
        if name not in _NAMES:
            raise unknown("option of a data source", name, _NAMES)
        if not equals or not value or name in options:
            raise UsageError(f"option {pair!r} of {text!r} has no value, or two", fix="write ?resize=16&subset=5000")
        options[name] = as_option(name, value)
    return [place for place in places.split("|") if place], options


def as_option(name: str, value: Any) -> Any:
    """An option's value from text, or from what a caller of the library wrote.

    Raises:
        UsageError: not a whole number where one is needed.
    """
    if name == "classes":
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts)
    if name in _NUMBERS and value is not None:
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = None
        if number is None or (isinstance(value, float) and value != number):
            raise UsageError(f"{name}={value!r} is not a whole number")
        return number
    return value


def make_spec(places: list[str], options: Options) -> str:
    """The spec that `parse_spec` takes apart again."""
    query = options.text()
    return "|".join(places) + (f"?{query}" if query else "")
