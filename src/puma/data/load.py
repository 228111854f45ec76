"""`load_dataset`: opens every kind of source. ``PATH?resize=16&subset=5000&seed=0`` names it for another process."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from puma.data.checks import check_classes
from puma.data.formats import is_archive, load_archive, load_digits
from puma.data.images import kept, resized
from puma.data.names import NAMES, find_named, missing
from puma.data.parts import check_complete, expanded, joined_parts, name_of
from puma.data.sampler import stratified_rows
from puma.data.source import MapStyle, Source, blocks, converted, selected
from puma.data.spec import Options, option_value, parse_spec
from puma.errors import DataError, UsageError, unknown
from puma.io import fingerprint

logger = logging.getLogger("puma")

_KINDS = 'name "digits", "cifar10", an .npz, .npy or .parquet file, part files, an image folder, or hf:NAME:SPLIT'


def load_dataset(spec: str | Path | Iterable[str | Path] | MapStyle, **options: Any) -> Source:
    """Open a source of labelled images.

    Args:
        spec: one of

            - a name: ``"digits"``, ``"cifar10"``, ``"cifar100"``, ``"svhn"``, ``"imagenet"``, ``"edm-cifar10-1m"``
              (``"cifar10:test"`` is the test split), found below ``$PUMA_DATA`` or through ``datasets``;
            - an EDM ``.npz``, an ``.npy`` with its labels beside it, Parquet in the Hugging Face layout, MedMNIST's
              ``.npz``, CIFAR's python and binary archives, idx files, SVHN's ``.mat``, webdataset tars;
            - a folder with a folder of images for each class, or with part files;
            - ``"hf:NAME:SPLIT"`` or ``"hf:NAME:CONFIG:SPLIT"`` (needs the extra ``hub``);
            - a pattern (``"train-*.parquet"``) or a list of part files, which become one source;
            - ``(images, labels)``: arrays or tensors, uint8 NHWC or NCHW, or float in [0, 1];
            - a Hugging Face ``Dataset``, a list of pairs, any dataset of ``(image, label)`` with a length.

            Options may stand in the text, as in ``"cifar10.parquet?resize=16&subset=5000&seed=0"``.
        options: fields of `puma.data.load.Options`; they win over those in the text.

    Returns:
        A source: ``source[i]`` is ``(uint8 [H, W, C], int)``. Its ``spec`` opens the same source in another process.

    >>> load_dataset("digits").image_shape
    (8, 8, 1)
    >>> load_dataset("digits?resize=4&channels=3&classes=3,8").image_shape
    (4, 4, 3)

    Raises:
        UsageError: unknown kind of source, unknown option or value.
        DataError: missing, damaged or hostile file; wrong dtype, layout or labels; an empty class.
    """
    if isinstance(spec, (str, Path)):
        literal = ("?" in str(spec) or "|" in str(spec)) and Path(spec).exists()  # a file may be called like that
        places, written = ([str(spec)], {}) if literal else parse_spec(str(spec))
    elif isinstance(spec, (list, tuple)) and all(isinstance(part, (str, Path)) for part in spec):
        places, written = [str(part) for part in spec], {}
    else:
        from puma.data.objects import load_object

        chosen = _options({}, options)
        source = _prepared(load_object(spec, chosen), chosen)
        source.spec = source.spec if not str(chosen) else None  # of a source: its text does not know these options
        return source
    chosen = _options(written, options)
    if not places:
        raise UsageError("no source is named", fix=_KINDS)
    parts, files = [], []
    for number, place in enumerate(places):
        places[number], opened = _resolved(place, chosen)
        found, split = expanded(places[number], opened.split)
        files += found
        try:
            parts += [_opened(file, replace(opened, split=split)) for file in found]
        except DataError as error:
            if not (places[number] != place and error.what.endswith("cannot be opened")):
                raise
            raise missing(place.partition(":")[0].lower(), f"{error.what}: {error.why}") from None
    check_complete(files)
    if chosen.verify == "full":
        for part in parts:
            for block in blocks(len(part), part.image_shape) if part.images.slow else ():
                part.read(block)
    whole = joined_parts(parts, disjoint=chosen.verify == "full")
    source = _prepared(whole, chosen)
    source.name = name_of(Path(files[0])) if parts[0].name == Path(files[0]).stem else source.name
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


def _options(written: dict[str, Any], given: dict[str, Any]) -> Options:
    written |= {name: option_value(name, value) for name, value in given.items()}
    if written.get("labels"):
        written["labels"] = str(Path(written["labels"]).absolute())
    return Options(**written)


def _resolved(place: str, options: Options) -> tuple[str, Options]:
    """A named data set replaced by its place and the options it needs; any other place as it is."""
    kind, _, rest = place.partition(":")
    if kind.lower() not in NAMES or Path(place).exists():
        return place, options
    split = _one_split(place, rest, options.split) or "train"
    found, asked, label = find_named(kind.lower(), split)
    return found, replace(options, split=asked, label=options.label or label)


def _one_split(place: str, written: str, asked: str | None) -> str | None:
    if written and asked and written != asked:
        raise UsageError(f"{place}?split={asked} names two splits")
    return written or asked


def _opened(place: str, options: Options) -> Source:
    kind, _, rest = place.partition(":")
    path = Path(place)
    if kind == "digits" and not path.exists():
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
    if path.suffix == ".npz":
        from puma.data.npz import load_npz

        return load_npz(path, options)
    if path.suffix == ".npy":
        from puma.data.mapped import load_npy

        return load_npy(path, options)
    if path.suffix in (".parquet", ".pq"):
        from puma.data.parquet import load_parquet

        return load_parquet(path, options)
    if not path.exists():
        near = difflib.get_close_matches(place.partition(":")[0].lower(), [*NAMES, "digits"], n=1)
        raise DataError(f"{place} does not exist", fix=f"did you mean {near[0]!r}?" if near else _KINDS)
    if is_archive(path):
        return load_archive(path, options)
    if path.is_dir():
        from puma.data.folder import load_folder

        return load_folder(path, options)
    raise UsageError(f"{place} is of no known kind", fix=_KINDS)


def _prepared(source: Source, options: Options) -> Source:
    """Choose rows first, then convert only what is read. The fingerprint covers the options that change the data.

    Raises:
        UsageError: unknown class, a subset larger than what there is, RGB to grey.
        DataError: a class without an image.
    """
    images, labels, names = source.images, source.labels, source.class_names
    if options.classes is not None:
        numbers = [_class_number(name, names) for name in options.classes]
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
    changes = str(replace(options, verify="headers", split=None, label=None, labels=None))
    key = fingerprint({"of": source.fingerprint, "options": changes}) if changes else source.fingerprint
    images = kept(images, key) if images.slow else images
    if options.channels == 3 and bands == 1:
        images = converted(images, (*images.shape[1:3], 3), partial(np.repeat, repeats=3, axis=3))
    elif options.channels not in (None, bands):
        why = "that would throw away what is there"
        raise UsageError(f"{source.name} is RGB and does not become greyscale", why=why)
    return Source(images, labels, name=source.name, fingerprint=key, class_names=names, spec=source.spec)


def _class_number(text: str, names: tuple[str, ...]) -> int:
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise unknown("class", text, names)


def _absolute(place: str) -> str:
    """A place that means the same from another working directory."""
    kind, _, rest = place.partition(":")
    if kind == "hf":
        return f"hf:{Path(rest).absolute()}" if rest.startswith(".") else place
    return place if kind == "digits" and not Path(place).exists() else str(Path(place).absolute())
