"""`load_dataset`: one door to every kind of source."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from puma.data.digits import load_digits
from puma.data.images import Images, JoinedImages, ResizedImages, RgbImages, SelectedImages
from puma.data.layout import check_classes
from puma.data.source import ImageSource, Source
from puma.data.spec import Options, as_option, make_spec, parse_spec
from puma.data.stratified import stratified_rows
from puma.errors import DataError, UsageError, unknown
from puma.files import fingerprint

_KNOWN = set(Options.__dataclass_fields__)


def load_dataset(spec: str | Path | Iterable[str | Path], **options: Any) -> Source:
    """Open a source of labelled images.

    Args:
        spec: ``"digits"`` (also ``"digits:test"``, ``"digits:all"``); an EDM ``.npz``; Parquet in the Hugging Face
            layout; a pattern (``"train-*.parquet"``) or a list of part files, which become one source. Options may
            stand in the text, as in ``"cifar10.parquet?resize=16&subset=5000&seed=0"``.
        options: fields of `puma.data.spec.Options`; they win over those in the text.

    Returns:
        A source: ``source[i]`` is ``(uint8 [H, W, C], int)``.

    >>> load_dataset("digits").image_shape
    (8, 8, 1)

    Raises:
        UsageError: unknown kind of source, unknown option or value.
        DataError: missing, damaged or hostile file; wrong dtype, layout or labels; an empty class.
    """
    if isinstance(spec, (str, Path)):
        places, written = parse_spec(str(spec))
    else:
        places, written = [str(part) for part in spec], {}
    for name, value in options.items():
        if name not in _KNOWN:
            raise unknown("option of a data source", name, _KNOWN)
        written[name] = as_option(name, value)
    chosen = Options(**written)
    if not places:
        raise UsageError("no source is named", fix='write "digits", or the path of an .npz or .parquet file')
    parts = [_open(place, chosen) for place in _expanded(places)]
    source = parts[0] if len(parts) == 1 else _joined(parts)
    source = _prepared(source, chosen)
    places = [place if place.startswith("digits") else str(Path(place).absolute()) for place in places]
    source.spec = make_spec(places, chosen)
    return source


def _expanded(places: list[str]) -> list[str]:
    """Patterns replaced by the files they match, in order of their names."""
    out: list[str] = []
    for place in places:
        if any(sign in place for sign in "*?[") and not Path(place).exists():
            found = sorted(glob.glob(place))
            if not found:
                raise DataError(f"no file matches {place!r}")
            out += found
        else:
            out.append(place)
    return out


def _open(place: str, options: Options) -> ImageSource:
    if place.partition(":")[0] == "digits" and not Path(place).exists():
        return load_digits(place.partition(":")[2] or "train")
    path = Path(place)
    if path.suffix == ".npz":
        from puma.data.npz import load_npz

        return load_npz(path, verify=options.verify)
    if path.suffix in (".parquet", ".pq"):
        from puma.data.parquet import load_parquet

        return load_parquet(path, verify=options.verify, resize=options.resize)
    if not path.exists():
        raise DataError(f"{place} does not exist", fix='name "digits", an .npz or a .parquet file')
    raise UsageError(f"{place} is of no known kind", fix='name "digits", an .npz or a .parquet file')


def _joined(parts: list[ImageSource]) -> ImageSource:
    """Several part files as one source."""
    first = parts[0]
    for part in parts[1:]:
        if part.image_shape != first.image_shape:
            raise DataError(f"{part.name} has images {part.image_shape}, {first.name} has {first.image_shape}")
    names = max((part.class_names for part in parts), key=len)
    return ImageSource(
        JoinedImages([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        name=first.name,
        fingerprint=fingerprint({"parts": [part.fingerprint for part in parts]}),
        class_names=names,
    )


def _prepared(source: ImageSource, options: Options) -> ImageSource:
    """Apply the options, cheapest first: choose rows, then convert only what is read."""
    images, labels, names = source.images, source.labels, source.class_names
    if options.classes is not None:
        numbers = [_class_number(name, names) for name in options.classes]
        table = np.full(len(names), -1, dtype=np.int64)
        table[numbers] = np.arange(len(numbers))
        rows = np.flatnonzero(table[labels] >= 0)
        images, labels, names = SelectedImages(images, rows), table[labels[rows]], tuple(names[n] for n in numbers)
    check_classes(labels, source.name, names)
    if options.subset is not None:
        rows = stratified_rows(labels, options.subset, options.seed)
        images, labels = SelectedImages(images, rows), labels[rows]
        check_classes(labels, f"{source.name}, subset of {options.subset:,}", names)
    if options.resize is not None and images.shape[1:3] != (options.resize, options.resize):
        images = ResizedImages(images, options.resize)
    images = _with_channels(images, options.channels, source.name)
    changes = replace(options, verify="free", split=None, labels=None).text()
    return ImageSource(
        images,
        labels,
        name=source.name,
        fingerprint=fingerprint({"of": source.fingerprint, "options": changes}) if changes else source.fingerprint,
        class_names=names,
        spec=source.spec,
    )


def _with_channels(images: Images, channels: int | None, name: str) -> Images:
    if channels is None or channels == images.shape[3]:
        return images
    if channels == 1:
        raise UsageError(f"{name} is RGB and does not become greyscale", why="that would throw away what is there")
    return RgbImages(images)


def _class_number(text: str, names: tuple[str, ...]) -> int:
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise unknown("class", text, names)
