"""Sources from Python objects: Hugging Face data sets (``hf:NAME:SPLIT`` too) and any map-style dataset."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.checks import LABEL_NAMES, check_image_layout, check_labels
from puma.data.images import EncodedImages
from puma.data.source import Images, MapStyle, Pixels, Rows, Source
from puma.errors import DataError, UsageError, unknown

_SAMPLED = 256


def _sampled(size: int, verify: str) -> Rows:
    """The rows that a fingerprint covers: 256 spread over all, every one with ``verify="full"``."""
    return np.arange(size) if verify == "full" else np.unique(np.linspace(0, size - 1, _SAMPLED).astype(np.int64))


def load_hub(
    name: str, split: str = "train", *, verify: str = "headers", resize: int | None = None, channels: int | None = None
) -> Source:
    """Open a data set of the Hugging Face hub (from its cache when offline), or one that ``save_to_disk`` wrote.

    Args:
        name: ``"uoft-cs/cifar10"``, or a folder.
        split: ``"train"``, ``"test"``, ...
        verify: ``"full"`` fingerprints every image rather than 256 of them.
        resize: scale each image to this side.
        channels: 3 makes RGB of grey images.

    Raises:
        UsageError: ``datasets`` is not installed, or there is no such split.
        DataError: it cannot be opened, or has no image or label column.
    """
    table = _opened(name, split)
    from datasets import ClassLabel, Image

    where, features = f"hf:{name}:{split}", table.features
    image = next((column for column, kind in features.items() if isinstance(kind, Image)), None)
    label = next((column for column, kind in features.items() if isinstance(kind, ClassLabel)), None)
    label = label or next((column for column in LABEL_NAMES if column in features), None)
    if image is None or label is None:
        raise DataError(f"{where} has no {'label' if image else 'image'} column", why=f"it has: {features}")
    names = getattr(features[label], "names", None)
    labels = np.asarray(table.select_columns([label]).with_format("numpy")[:][label])
    values = check_labels(labels, len(table), f"{where}: {label}", names)
    files = HubBytes(table.select_columns([image]).cast_column(image, Image(decode=False)), image, where)
    digest = hashlib.sha256(values.astype("<i8").tobytes())
    for row in _sampled(len(table), verify):
        digest.update(files(np.array([row]))[0])
    return Source(
        EncodedImages(files, len(table), resize, channels),
        values,
        name=f"{Path(name).name}-{split}",
        fingerprint=digest.hexdigest(),
        class_names=names,
    )


class HubBytes:
    """The encoded images of a Hugging Face data set by row."""

    def __init__(self, table: Any, column: str, name: str) -> None:
        self._table, self._column, self._name = table, column, name

    def where(self, row: int) -> str:
        """The data set, the column and the row."""
        return f"{self._name}: {self._column}, row {row:,}"

    def __call__(self, rows: Rows) -> list[Any]:
        """The bytes at ``rows``.

        Raises:
            DataError: a row without an image, or whose file has vanished.
        """
        out = []
        for row, item in zip(rows, self._table[[int(row) for row in rows]][self._column], strict=True):
            try:
                out.append(item["bytes"] or Path(item["path"]).read_bytes())
            except (TypeError, OSError) as error:
                raise DataError(f"{self.where(row)} holds no image", why=str(error)) from None
        return out


def _opened(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(f"hf:{name} needs the package datasets", fix="pip install 'puma-robust[hub]'") from None
    try:
        if Path(name).is_dir() and any((Path(name) / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            stored = datasets.load_from_disk(name)
            if not isinstance(stored, datasets.DatasetDict):
                return stored
            if split not in stored:
                raise unknown("split", split, list(stored))
            return stored[split]
        return datasets.load_dataset(name, split=split)
    except UsageError:
        raise
    except Exception as error:  # whatever the package raises: network, cache, scripts, formats
        raise DataError(
            f"hf:{name}:{split} cannot be opened",
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            fix="check the name and the split; without network it has to lie in the cache, or name a Parquet file",
        ) from None


def load_mapstyle(dataset: MapStyle, *, name: str | None = None, verify: str = "headers") -> Source:
    """Take a dataset of ``(image, label)``: uint8 ``[H, W, C]`` (or ``[H, W]``) arrays or 8-bit Pillow images.

    Labels are read from its ``labels`` or ``targets`` where it has such an attribute of its length, else by going
    through it once. The fingerprint covers the labels and 256 images spread over it (all with ``verify="full"``).
    A dataset in memory has no spec: another process cannot open it.

    Raises:
        DataError: empty, items of another form, images that differ each time they are read (a random transform).
    """
    size = len(dataset)
    called = name or type(dataset).__name__.lower()
    if not size:
        raise DataError(f"{called} is empty")
    items = _Items(dataset, called)
    first, _ = items[0]
    if not np.array_equal(first, items[0][0]):
        raise DataError(
            f"{called}: item 0 is another image each time it is read",
            why="a random transform; margins belong to fixed images",
            fix="take the dataset without augmentation: recipes augment by themselves",
        )
    items.shape = first.shape
    images = Images((size, *first.shape), items.read, slow=True)
    rows = _sampled(size, verify)
    labels = items.labels(rows)
    digest = hashlib.sha256(repr(images.shape).encode() + labels.astype("<i8").tobytes())
    for row in rows:
        digest.update(images.read(np.array([row])).tobytes())
    names = getattr(dataset, "classes", None) or getattr(dataset, "class_names", None)
    named = [str(text) for text in names] if names is not None and len(names) > int(labels.max()) else None
    return Source(images, labels, name=called, fingerprint=digest.hexdigest(), class_names=named)


class _Items:
    """Checked items of a map-style dataset."""

    def __init__(self, dataset: MapStyle, name: str) -> None:
        self._dataset, self._name = dataset, name
        self.shape: tuple[int, ...] = ()

    def __getitem__(self, row: int) -> tuple[Pixels, int]:
        item = self._dataset[row]
        where = f"{self._name}: item {row:,}"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where} is a {type(item).__name__}", why="items are pairs (image, label)")
        image, label = item
        pixels = np.asarray(image)
        if pixels.ndim == 2 and not hasattr(image, "detach"):
            pixels = pixels[..., None]
        if pixels.ndim != 3:
            raise DataError(f"{where}: the image has shape {pixels.shape}", why="images are uint8 [H, W, C]")
        check_image_layout((1, *pixels.shape), pixels.dtype, pixels, f"{where}: the image (with a batch axis)")
        number = np.asarray(label)
        if number.size != 1 or number.dtype.kind not in "iu":
            raise DataError(f"{where}: the label is {label!r}", why="labels are class numbers")
        return pixels, int(number.reshape(()))

    def read(self, rows: Rows) -> Pixels:
        out = np.empty((len(rows), *self.shape), np.uint8)
        for place, row in enumerate(rows.tolist()):
            image, _ = self[row]
            if image.shape != self.shape:
                seen = f"{self._name}: item {row:,} has shape {image.shape}, item 0 has {self.shape}"
                raise DataError(seen, why="all images of a source have one shape")
            out[place] = image
        return out

    def labels(self, sampled: Rows) -> NDArray[np.int64]:
        size = len(self._dataset)
        for attribute in ("labels", "targets"):
            values = getattr(self._dataset, attribute, None)
            if values is None or not hasattr(values, "__len__") or len(values) != size:
                continue
            labels = check_labels(np.asarray(values), size, f"{self._name}.{attribute}")
            for row in sampled.tolist():
                if (label := self[row][1]) != labels[row]:
                    seen = f"{self._name}: item {row:,} has label {label}"
                    raise DataError(f"{seen}, {self._name}.{attribute} says {labels[row]}")
            return labels
        return check_labels(np.array([self[row][1] for row in range(size)], np.int64), size, self._name)
