"""Several part files as one source: found by pattern or folder, checked to be complete, joined in order."""

from __future__ import annotations

import glob
import logging
import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np

from puma.data.source import Source, joined
from puma.data.summary import image_hashes, shared
from puma.errors import DataError, UsageError, unknown
from puma.io import fingerprint

logger = logging.getLogger("puma")

_OF = re.compile(r"^(?P<stem>.*?)[-_.]?(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]{6,})?$")
_PART = re.compile(r"^(?P<stem>.*(?:part|shard|chunk))[-_]?(?P<number>\d+)$", re.IGNORECASE)
SPLITS = {"train", "test", "val", "valid", "validation", "data", ""}


def expanded(place: str, split: str | None = None) -> tuple[list[str], str | None]:
    """A pattern or a folder of part files replaced by the files themselves, in order.

    Returns:
        The files, and the split if it has not been used yet.

    Raises:
        DataError: nothing matches.
        UsageError: a folder holds several splits and none is chosen.
    """
    if any(sign in place for sign in "*?[") and not Path(place).exists():
        matches = sorted(glob.glob(place), key=_order)
        if not matches:
            raise DataError(f"no file matches {place!r}")
        return matches, split
    if Path(place).is_dir() and (parts := _part_files(Path(place), split)):
        return _of_split(Path(place), parts, split), None
    return [place], split


def check_complete(places: list[str]) -> None:
    """Refuse a list of part files with one missing or one twice. A single part is taken as it is, with a warning.

    Raises:
        DataError: names the parts.
    """
    seen: set[Path] = set()
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for place in places:
        if (path := Path(place).resolve()) in seen:
            raise DataError(f"{place} is named twice", why="its images would count double")
        seen.add(path)
        if match := _OF.match(Path(place).stem) or _PART.match(Path(place).stem):
            total = match.groupdict().get("total") or ""
            groups[str(Path(place).with_name(match["stem"])), total][int(match["number"])] = place
    for (stem, total), parts in groups.items():
        last = max(parts)
        if total:  # counted from 0 or from 1
            first = 1 if int(total) in parts and 0 not in parts else 0
            missing = [number for number in range(first, first + int(total)) if number not in parts]
        else:
            missing = [number for number in range(1, last + 1) if number not in parts]
        if len(places) == 1 and (missing or (not total and _next_part(Path(places[0]), last).exists())):
            logger.warning("%s is one part of several; the others are left out", places[0])
        elif missing:
            named = ", ".join(str(number) for number in missing[:5])
            raise DataError(
                f"part {named} of {stem} {'is' if len(missing) == 1 else 'are'} missing",
                why=f"there are: {', '.join(map(str, sorted(parts)[:8]))}" + (f" of {total}" if total else ""),
                fix="get the missing part; to leave it out on purpose, name the parts as separate sources of a pool",
            )


def joined_parts(parts: list[Source], *, disjoint: bool = False) -> Source:
    """Part files as one source, in the order given; ``disjoint`` reads all of them and refuses parts that overlap.

    Two parts overlap where neighbouring rows of one are neighbouring rows of the other, pixel for pixel. Single equal
    images are left alone (data sets hold some, and ``puma data show`` lists them).

    Raises:
        DataError: parts of different image shapes or class names, one part's data twice, or an overlap.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    seen: dict[str, str] = {}
    for part in parts:
        if part.image_shape != first.image_shape:
            raise DataError(f"{part.name} has images of {part.image_shape}, {first.name} of {first.image_shape}")
        if part.fingerprint in seen:
            both = f"{part.name} and {seen[part.fingerprint]}"
            raise DataError(f"{both} hold the same data", why="their images would count double")
        seen[part.fingerprint] = part.name
    names = max((part.class_names for part in parts), key=len)  # of class-sorted parts, the last knows most classes
    for part in parts:
        if part.class_names != names[: part.num_classes]:
            why = f"{part.class_names}, {names}"
            raise DataError(f"{part.name} has other class names than the other parts", why=why)
    if disjoint:
        _check_disjoint(parts)
    return Source(
        joined([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        name=first.name,
        fingerprint=fingerprint({"parts": [part.fingerprint for part in parts]}),
        class_names=names,
    )


def _check_disjoint(parts: list[Source]) -> None:
    hashes = [image_hashes(part) for part in parts]
    for (first, ours), (second, theirs) in combinations(zip(parts, hashes, strict=True), 2):
        both = shared(second, theirs, first, ours)
        together = np.flatnonzero((np.diff(both.rows) == 1) & (np.diff(both.twins) == 1))
        if len(together):
            row, twin = both.rows[together[0]], both.twins[together[0]]
            raise DataError(
                f"{second.name} and {first.name} overlap: {len(both):,} of {len(second):,} images are in both",
                why=f"row {row:,} on of the one is row {twin:,} on of the other: these images would count double",
                fix="cut the parts apart, or leave one out",
            )


def name_of(path: Path) -> str:
    """A short name for a file: without its part number, and after its folder where it is only called after a split.

    >>> [name_of(Path(place)) for place in ("cifar10/train-00000-of-00002.parquet", "20m-part1.npz", "1m.npz")]
    ['cifar10-train', '20m', '1m']
    """
    match = _OF.match(path.stem) or _PART.match(path.stem)
    stem = re.sub(r"[-_.]*(part|shard|chunk)?[-_.]*$", "", match["stem"], flags=re.IGNORECASE) if match else path.stem
    folder = path.absolute().parent
    folder = folder.parent if folder.name == "data" else folder
    return f"{folder.name}-{stem}" if stem in SPLITS else stem or path.stem


def _next_part(path: Path, number: int) -> Path:
    """Where the part after number ``number`` would lie."""
    digits = re.findall(r"\d+$", path.stem)[-1]
    return path.with_name(f"{path.stem.removesuffix(digits)}{number + 1:0{len(digits)}}{path.suffix}")


def _part_files(folder: Path, split: str | None) -> list[Path]:
    """The Parquet or ``.npz`` files directly in a folder, or in its ``data`` or split folder as on the hub."""
    for place in (folder, folder / "data", *([folder / split] if split and "/" not in split else [])):
        for ending in ("*.parquet", "*.npz"):
            if files := sorted(place.glob(ending), key=lambda path: _order(str(path))):
                return files
    return []


def _of_split(folder: Path, parts: list[Path], split: str | None) -> list[str]:
    if split is not None and parts[0].parent == folder / split:
        return [str(path) for path in parts]
    splits = defaultdict(list)
    for path in parts:
        match = _OF.match(path.stem)
        splits[match["stem"] if match else path.stem].append(str(path))
    if split is None and len(splits) > 1 and not all(_PART.match(path.stem) for path in parts):
        fix = f'choose one: "{folder}?split={sorted(splits)[-1]}"'
        raise UsageError(f"{folder} holds {', '.join(sorted(splits))}", fix=fix)
    if split is None:
        return [str(path) for path in parts]
    if split not in splits:
        raise unknown(f"split of {folder}", split, splits)
    return splits[split]


def _order(place: str) -> list[str | int]:
    """Names with their numbers as numbers, so that part 10 comes after part 9."""
    return [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", place)]
