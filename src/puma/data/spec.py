"""Specs: ``PATH?resize=16&subset=5000&seed=0`` names a source so that another process can open the same one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from puma.errors import UsageError, unknown

_NUMBERS = ("resize", "channels", "subset", "seed")


@dataclass(frozen=True)
class Options:
    """What may be asked of any source.

    Args:
        resize: scale every image to this side, in pixels, 1..4096.
        channels: 3 turns greyscale into RGB; 1 only states what is there.
        classes: keep only these classes, by name or number; they are renumbered in this order.
        subset: keep this many images: stratified and seeded, never a prefix.
        seed: of the subset.
        split: which of several splits, where there are some.
        label: which of several label columns.
        labels: the ``.npy`` file of labels that belongs to an ``.npy`` of images.
        verify: ``"headers"``, or ``"full"``, which reads every byte once and compares checksums.
    """

    resize: int | None = None
    channels: int | None = None
    classes: tuple[str, ...] | None = None
    subset: int | None = None
    seed: int = 0
    split: str | None = None
    label: str | None = None
    labels: str | None = None
    verify: Literal["headers", "full"] = "headers"

    def __post_init__(self) -> None:
        if self.resize is not None and not 1 <= self.resize <= 4096:
            raise UsageError(f"resize={self.resize} is not a side in 1..4096")
        if self.channels not in (None, 1, 3):
            raise UsageError(f"channels={self.channels}", why="1 (grey) or 3 (RGB) are understood")
        if self.subset is not None and self.subset < 1:
            raise UsageError(f"subset={self.subset} keeps no image")
        if self.seed and self.subset is None:
            raise UsageError(f"seed={self.seed} is not used", why="it chooses a subset", fix="add subset=5000")
        if self.classes is not None and (not self.classes or len(set(self.classes)) != len(self.classes)):
            raise UsageError(f"classes={','.join(self.classes)} is empty or names a class twice")
        if self.verify not in ("headers", "full"):
            raise unknown("way to verify", self.verify, ("headers", "full"))

    def __str__(self) -> str:
        """The options that differ from their defaults, as they stand after the ``?``."""
        pairs = {item.name: getattr(self, item.name) for item in fields(self)}
        pairs = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in pairs.items()}
        return "&".join(f"{i.name}={pairs[i.name]}" for i in fields(self) if pairs[i.name] != i.default)

    def only(self, place: object, *used: str) -> None:
        """Refuse options that this kind of source does not use.

        Raises:
            UsageError: ``split``, ``label`` or ``labels`` is set and not among ``used``.
        """
        for name in {"split", "label", "labels"} - {*used}:
            if getattr(self, name) is not None:
                raise UsageError(f"{place}: the option {name}={getattr(self, name)} is not used", fix="leave it out")


_NAMES = tuple(item.name for item in fields(Options))


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
        name, _, value = pair.partition("=")
        if not value or name in options:
            raise UsageError(f"option {pair!r} of {text!r} has no value, or two", fix="write ?resize=16&subset=5000")
        options[name] = option_value(name, value)
    return [place for place in places.split("|") if place], options


def option_value(name: str, value: Any) -> Any:
    """An option's value from text, or from what a caller of the library wrote."""
    if name not in _NAMES:
        raise unknown("option of a data source", name, _NAMES)
    if name == "classes":
        return tuple(str(part).strip() for part in (value.split(",") if isinstance(value, str) else value))
    if name in _NUMBERS and value is not None:
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = None
        if number is None or (isinstance(value, float) and value != number):
            raise UsageError(f"{name}={value!r} is not a whole number")
        return number
    return value
