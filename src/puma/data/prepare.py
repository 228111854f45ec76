"""The options of a source, applied to what its file holds: classes, subset, size, channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from puma.data.images import Images, ResizedImages, RgbImages, SelectedImages, remembered
from puma.data.layout import check_classes
from puma.data.source import ImageSource
from puma.data.spec import Options
from puma.data.stratified import stratified_rows
from puma.errors import UsageError, unknown
from puma.io import fingerprint as fingerprint_of


def prepared(source: ImageSource, options: Options) -> ImageSource:
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
        images, labels, names = SelectedImages(images, rows), table[labels[rows]], tuple(names[n] for n in numbers)
    check_classes(labels, source.name, names)
    if options.subset is not None:
        rows = stratified_rows(labels, options.subset, options.seed)
        images, labels = SelectedImages(images, rows), labels[rows]
        check_classes(labels, f"{source.name}, subset of {options.subset:,}", names)
    if options.resize is not None and images.shape[1:3] != (options.resize, options.resize):
        images = remembered(ResizedImages(images, options.resize))
    images = _with_channels(images, options.channels, source.name)
    changes = replace(options, verify="free", split=None, labels=None).text()
    return ImageSource(
        images,
        labels,
        name=source.name,
        fingerprint=_changed_fingerprint(source.fingerprint, changes),
        class_names=names,
        spec=source.spec,
    )


def _changed_fingerprint(fingerprint: str, changes: str) -> str:
    """The fingerprint of data made from other data by ``changes``; unchanged data keeps its own."""
    return fingerprint_of({"of": fingerprint, "options": changes}) if changes else fingerprint


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
