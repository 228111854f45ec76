"""`load_dataset`: opens every kind of source. ``PATH?resize=16&subset=5000&seed=0`` names it for another process."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from puma.data.checks import check_classes, chosen_split, number_in
from puma.data.formats import is_archive, load_archive, load_digits, load_folder
from puma.data.images import kept, load_parquet, resized
from puma.data.npz import load_npz
from puma.data.source import MapStyle, Options, Source, as_option, blocks, converted, joined, selected, stratified_rows
from puma.errors import DataError, StorageError, UsageError, unknown
from puma.io import REGISTRIES, fingerprint

logger = logging.getLogger("puma")

_KINDS = 'name "digits", "cifar10", an .npz or .parquet file, part files, an image folder, or hf:NAME:SPLIT'
_INSTEAD = {
    **dict.fromkeys((".pt", ".pth"), "weights: puma score torchvision:NAME SOURCE --weights FILE --out margins"),
    ".npy": "np.savez(path, image=<uint8 [N, H, W, C]>, label=<int64 [N]>)",
    ".tar": "hf:./FOLDER reads the webdataset tars of a folder",
}
_EDM = "https://huggingface.co/datasets/P2333/DM-Improves-AT"
_OF = re.compile(r"^(?P<stem>.*?)[-_.]?(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]{6,})?$")
_PART = re.compile(r"^(?P<stem>.*(?:part|shard|chunk))[-_]?(?P<number>\d+)$", re.IGNORECASE)
_SPLITS = {"train", "test", "val", "valid", "validation", "data", ""}


def load_dataset(spec: str | Path | Iterable[str | Path] | MapStyle, **options: Any) -> Source:
    """Open a source of labelled images.

    Args:
        spec: one of

            - a name: ``"digits"``, ``"cifar10"``, ``"cifar100"``, ``"svhn"``, ``"imagenet"``, ``"edm-cifar10-1m"``
              (``"cifar10:test"`` is the test split), found below ``$PUMA_DATA`` or through ``datasets``;
            - an EDM ``.npz``, Parquet in the Hugging Face layout, or a file of docs/data.md;
            - a folder with a folder of images for each class, or with part files;
            - ``"hf:NAME:SPLIT"`` or ``"hf:NAME:CONFIG:SPLIT"`` (needs the extra ``hub``);
            - a pattern (``"train-*.parquet"``) or a list of part files, which become one source;
            - ``(images, labels)``: arrays or tensors, uint8 NHWC or NCHW, or float in [0, 1];
            - a Hugging Face ``Dataset``, a list of pairs, any dataset of ``(image, label)`` with a length.
        options: as in ``"cifar10.parquet?resize=16&subset=5000"`` (`puma.data.source.Options`); these win over those.

    ``source[i]`` is ``(uint8 [H, W, C], int)``; ``source.spec`` opens the same source in another process.
    `UsageError` for an unknown kind, option or value; `DataError` for missing, damaged, hostile or wrong data.

    Examples:
        >>> load_dataset("digits?resize=4&channels=3&classes=3,8").image_shape
        (4, 4, 3)
    """
    given = {name: value for name, v in options.items() if (value := as_option(name, v)) is not None}
    if isinstance(spec, (str, Path)):
        places, written = _parsed(str(spec))
    elif isinstance(spec, (list, tuple)) and all(isinstance(part, (str, Path)) for part in spec):
        places, written = [str(part) for part in spec], {}
    else:
        from puma.data.objects import load_object

        chosen = Options(**given)
        source = _prepared(load_object(spec, chosen), chosen)
        source.spec = source.spec if not str(chosen) else None  # of a source: its text does not know these options
        return source
    chosen = Options(**(written | given))
    if not places:
        raise UsageError("no source is named", fix=_KINDS)
    parts, files = [], []
    for number, place in enumerate(places):
        try:
            places[number], opened = _resolved(place, chosen)
            found, split = _expanded(places[number], opened.split)
            files += found
            parts += [_opened(file, replace(opened, split=split)) for file in found]
        except StorageError:
            raise
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise DataError(f"cannot read {place[:200]}", why=error.strerror or str(error)) from None
    _check_complete(files)
    if chosen.verify == "full":
        for part in parts:
            for block in blocks(len(part), part.image_shape) if part.images.slow else ():
                part.read(block)
    source = _prepared(_joined(parts), chosen)
    source.name = _name_of(Path(files[0])) if parts[0].name == Path(files[0]).stem else source.name
    chosen = replace(chosen, split=opened.split, label=opened.label)
    source.spec = "?".join(filter(None, ("|".join(map(_absolute, places)), str(chosen))))
    return source


def as_source(dataset: Source | MapStyle | str | Path) -> Source:
    """``dataset`` itself if it is a source already, else `load_dataset` of it; a Python object may lack classes."""
    if isinstance(dataset, (str, Path)):
        return load_dataset(dataset)
    from puma.data.objects import load_object

    source = load_object(dataset, Options())
    source.images = kept(source.images, source.fingerprint) if source.images.slow else source.images
    return source


def _parsed(text: str) -> tuple[list[str], dict[str, Any]]:
    """The places (joined by ``|``) and the options of a spec."""
    places, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if not value or name in options:
            raise UsageError(f"option {pair!r} of {text!r} has no value, or two", fix="write ?resize=16&subset=5000")
        options[name] = as_option(name, value)
    return [place for place in places.split("|") if place], options


def _one_split(place: str, written: str, asked: str | None) -> str | None:
    if written and asked and written != asked:
        raise UsageError(f"{place}?split={asked} names two splits")
    return written or asked


def _opened(place: str, options: Options) -> Source:
    kind, _, rest = place.partition(":")
    path = Path(place)
    if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would never end
        raise DataError(f"{place} is no regular file", fix=_KINDS)
    if kind == "digits":
        options.only(place, "split")
        return load_digits(_one_split(place, rest, options.split))
    if kind == "hf":
        from puma.data.objects import load_hub

        options.only(place, "split", "label")
        name, *more = rest.split(":")
        if len(more) + (options.split is not None) > 2:
            raise UsageError(f"{place} names too much", fix="write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        *config, split = [*more, options.split] if options.split else more or ["train"]
        return load_hub(name, config[0] if config else None, replace(options, split=split))
    if not path.exists():
        known = [*_NAMED, "digits", *(str(file) for file in path.parent.glob("*"))]
        near = difflib.get_close_matches(kind, known, n=1)
        fix = f"did you mean {near[0]!r}?" if near else _KINDS
        fix = f"that is a model: puma score {place} SOURCE --out margins" if kind in REGISTRIES else fix
        raise DataError(f"{place} does not exist", fix=fix)
    if path.suffix == ".npz":
        return load_npz(path, options)
    if path.suffix in (".parquet", ".pq"):
        return load_parquet(path, options)
    if is_archive(path):
        return load_archive(path, options)
    if path.is_dir():
        return load_folder(path, options)
    raise UsageError(f"{place} is of no known kind", fix=_INSTEAD.get(path.suffix, _KINDS))


def _prepared(source: Source, options: Options) -> Source:
    """Choose rows first, then convert only what is read. The fingerprint covers the options that change the data."""
    images, labels, names = source.images, source.labels, source.class_names
    if options.classes is not None:
        numbered = not any(map(number_in, names))  # else 1 may mean the class called so, or the second
        known = {str(number): number for number in range(len(names)) if numbered}
        known |= {name: number for number, name in enumerate(names)}
        if lacking := [name for name in options.classes if name not in known]:
            raise unknown("class", lacking[0], names)
        numbers = [known[name] for name in options.classes]
        if len(set(numbers)) != len(numbers):
            raise UsageError(f"classes={','.join(options.classes)} names a class twice")
        table = np.full(len(names), -1, dtype=np.int64)
        table[numbers] = np.arange(len(numbers))
        rows = np.flatnonzero(table[labels] >= 0)
        images, labels, names = selected(images, rows), table[labels[rows]], tuple(names[n] for n in numbers)
    check_classes(labels, source.name, names)
    if len(names) == 1 and options.classes is None:
        logger.warning("%s has a single class, %r", source.name, names[0])
    if options.subset is not None:
        rows = stratified_rows(labels, options.subset, options.seed)
        images, labels = selected(images, rows), labels[rows]
        check_classes(labels, f"{source.name}, subset of {options.subset:,}", names)
    size, bands = options.resize, images.shape[3]
    if size is not None and images.shape[1:3] != (size, size):
        images = converted(images, (size, size, bands), partial(resized, size=size), slow=True)
    changes = str(replace(options, verify="headers", split=None, label=None))
    key = fingerprint({"of": source.fingerprint, "options": changes}) if changes else source.fingerprint
    images = kept(images, key) if images.slow else images
    if options.channels == 3 and bands == 1:
        images = converted(images, (*images.shape[1:3], 3), partial(np.repeat, repeats=3, axis=3), slow=False)
    elif options.channels not in (None, bands):
        raise UsageError(f"{source.name} is RGB and does not become greyscale")
    return Source(images, labels, name=source.name, fingerprint=key, class_names=names, spec=source.spec)


def _absolute(place: str) -> str:
    """A place that means the same from another working directory."""
    kind, _, rest = place.partition(":")
    if kind == "hf":
        return f"hf:{Path(rest).absolute()}" if rest.startswith(".") else place
    return place if kind == "digits" else str(Path(place).absolute())


# --- data sets by name ---------------------------------------------------------------------------------------------


def _places(number: int, config: str) -> str:
    archives = " ".join(f"cifar-{number}-{kind}" for kind in ("python.tar.gz", "binary.tar.gz", "binary", "python"))
    return f"cifar{number}/{config} cifar{number} {archives} cifar-{number}-batches-py cifar-{number}-batches-bin"


# where each may lie below $PUMA_DATA; its name on the hub, or the published file; its label column where it has two
_NAMED: dict[str, tuple[str, str, str | None]] = {
    "cifar10": (_places(10, "plain_text"), "uoft-cs/cifar10", None),
    "cifar100": (_places(100, "cifar100"), "uoft-cs/cifar100", "fine_label"),
    "svhn": (
        "svhn/{split}_32x32.mat {split}_32x32.mat svhn/cropped_digits",
        "ufldl-stanford/svhn:cropped_digits",
        None,
    ),
    "imagenet": ("imagenet imagenet-1k ILSVRC/Data/CLS-LOC", "ILSVRC/imagenet-1k", None),
    "edm-cifar10-1m": ("edm-cifar10-1m.npz edm_data/cifar10/1m.npz", "cifar10/1m.npz", None),
}


def _resolved(place: str, options: Options) -> tuple[str, Options]:
    """A data set's name replaced by its place (on disk, else the hub) and the options it needs; others as they are.

    A folder of the name without a training split is just a folder.
    """
    name, _, rest = place.partition(":")
    name, here = name.lower(), Path(place)
    if name not in _NAMED or (here.exists() and not any(any(here.glob(at)) for at in ("*train*", "*/*train*"))):
        return place, options
    split = _one_split(place, rest, options.split) or "train"
    places, published, label = _NAMED[name]
    files = places.split()
    options = replace(options, split=split, label=options.label or label)
    roots = [*([Path(os.environ["PUMA_DATA"])] if os.environ.get("PUMA_DATA") else []), Path(), Path("data")]
    for root in roots:
        for file in files:
            path = (root / file.format(split=split)).expanduser()
            if path.exists():
                one_split = "{split}" in file or path.suffix == ".npz"
                return str(path), replace(options, split=None) if one_split else options
    searched = ", ".join(str(root.absolute()) for root in roots)
    if published.endswith(".npz"):
        why = f"it is published at {_EDM}; `curl -sL {_EDM}/raw/main/{published}` prints its sha256 and size"
        fix = f"curl -L -o {files[0]} {_EDM}/resolve/main/{published} && export PUMA_DATA=$PWD"
        raise DataError(f"{name} is not on this machine: no {files[0]} in {searched}", why=why, fix=fix)
    if importlib.util.find_spec("datasets") is not None:
        return f"hf:{published}", options
    why = f"there is nothing of it in {searched}, and the package datasets is not installed"
    get = f"hf download {published.partition(':')[0]} --repo-type dataset --local-dir {name}"
    fix = f"pip install 'puma-robust[hub]' && {get} && export PUMA_DATA=$PWD"
    raise DataError(f"{name} is not on this machine", why=why, fix=fix)


# --- part files ----------------------------------------------------------------------------------------------------


def _expanded(place: str, split: str | None) -> tuple[list[str], str | None]:
    """A pattern or a folder of part files replaced by the files in order; and the split if it is still to be used."""
    folder = Path(place)
    if any(sign in place for sign in "*?[") and not folder.exists():
        matches = sorted(glob.glob(place), key=_order)
        if not matches:
            raise DataError(f"no file matches {place!r}")
        return matches, split
    # on the hub they lie in the folder itself, in ``data`` or in one named after the split
    inside = [folder, folder / "data", *([folder / split] if split and "/" not in split else [])]
    listings = (list(map(str, path.glob(kind))) for path in inside for kind in ("*.parquet", "*.npz"))
    parts = sorted(next(filter(None, listings), []), key=_order)
    if not folder.is_dir() or not parts:
        return [place], split
    if split is not None and Path(parts[0]).parent == folder / split:
        return parts, None
    splits = defaultdict(list)
    for path in parts:
        match = _OF.match(Path(path).stem)
        splits[match["stem"] if match else Path(path).stem].append(path)
    if split is None and (len(splits) < 2 or all(_PART.match(Path(path).stem) for path in parts)):
        return parts, None
    return splits[chosen_split(folder, split, sorted(splits))], None


def _order(place: str) -> list[str | int]:
    """Names with their numbers as numbers, so that part 10 comes after part 9."""
    return [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", place)]


def _check_complete(places: list[str]) -> None:
    """Refuse part files with one missing; a single part is taken as it is, with a warning."""
    groups: dict[tuple[str, str], set[int]] = defaultdict(set)
    for place in places:
        if match := _OF.match(Path(place).stem) or _PART.match(Path(place).stem):
            total = match.groupdict().get("total") or ""
            groups[str(Path(place).with_name(match["stem"])), total].add(int(match["number"]))
    for (stem, total), parts in groups.items():
        first = 1 if not total or (int(total) in parts and 0 not in parts) else 0  # ``-of-`` may count from 0 or 1
        stop = first + int(total) if total else max(parts) + 1
        missing = [str(number) for number in range(first, stop) if number not in parts]
        if missing and len(places) == 1:
            logger.warning("%s is one part of several; the others are left out", places[0])
        elif missing:
            what = f"part {', '.join(missing[:5])} of {stem} {'is' if len(missing) == 1 else 'are'} missing"
            why = f"there are: {', '.join(map(str, sorted(parts)[:8]))}" + (f" of {total}" if total else "")
            fix = "get the missing part; to leave it out on purpose, name the parts as separate sources of a pool"
            raise DataError(what, why=why, fix=fix)


def _joined(parts: list[Source]) -> Source:
    """Part files as one source, in the order given; `DataError` for other shapes or classes, or the same data twice."""
    first = parts[0]
    if len(parts) == 1:
        return first
    seen: dict[str, str] = {}
    names = max((part.class_names for part in parts), key=len)  # of class-sorted parts, the last knows most classes
    for part in parts:
        if part.image_shape != first.image_shape:
            raise DataError(f"{part.name} has images of {part.image_shape}, {first.name} of {first.image_shape}")
        if part.fingerprint in seen:
            both = f"{part.name} and {seen[part.fingerprint]}"
            raise DataError(f"{both} hold the same data", why="their images would count double")
        if part.class_names != names[: part.num_classes]:
            why = f"{part.class_names}, {names}"
            raise DataError(f"{part.name} has other class names than the other parts", why=why)
        seen[part.fingerprint] = part.name
    images, labels = joined([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    digest = fingerprint({"parts": [part.fingerprint for part in parts]})
    return Source(images, labels, name=first.name, fingerprint=digest, class_names=names)


def _name_of(path: Path) -> str:
    """A short name: without the part number ("20m-part1" is "20m"), after its folder where it names only a split."""
    match = _OF.match(path.stem) or _PART.match(path.stem)
    stem = re.sub(r"[-_.]*(part|shard|chunk)?[-_.]*$", "", match["stem"], flags=re.IGNORECASE) if match else path.stem
    folder = path.absolute().parent
    folder = folder.parent if folder.name in ("data", "plain_text") else folder
    return f"{folder.name}-{stem}" if stem in _SPLITS else stem or path.stem
