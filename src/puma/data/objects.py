"""Sources from Python objects: arrays, tensors, Hugging Face data sets (``hf:NAME:SPLIT`` too), map-style datasets."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from puma.data.checks import check_image_layout, check_labels, chosen_label, chosen_split
from puma.data.images import EncodedImages, fitted, picture_pixels
from puma.data.source import Images, MapStyle, Options, Pixels, Rows, Source, in_memory
from puma.errors import DataError, UsageError
from puma.io import offline_without_hub

logger = logging.getLogger("puma")

_SAMPLED, _TWICE = 256, 16


def load_object(dataset: Any, options: Options) -> Source:
    """Take ``(images, labels)``, a Hugging Face data set, or a map-style dataset of ``(image, label)``; it has no spec.

    Fingerprints cover the labels and all images of arrays, else 256 images (every one with ``verify="full"``).
    """
    if isinstance(dataset, Source):
        return dataset
    hub = hasattr(dataset, "column_names")
    several = hub and hasattr(dataset, "keys")
    options.only("a Python object", *["label"] * hub, *["split"] * several)
    if hub:
        dataset = dataset[chosen_split("the data", options.split, list(dataset))] if several else dataset
        if not hasattr(dataset, "__len__"):
            raise UsageError("the data is a stream, without a length or rows", fix="load it with streaming=False")
        name = f"{getattr(dataset.info, 'dataset_name', None) or 'dataset'}-{dataset.split or 'rows'}"
        return _of_table(dataset, name, options)
    pair = isinstance(dataset, (tuple, list)) and len(dataset) == 2 and getattr(dataset[0], "ndim", 0) >= 3
    if pair and np.ndim(_plain(dataset[1])) > 0:
        images, rounded = _pixels(dataset[0], "images")
        _warn_rounded("images", rounded)
        labels = check_labels(_plain(dataset[1]), len(images), "labels")
        digest = hashlib.sha256(repr(images.shape).encode() + images.tobytes() + labels.astype("<i8").tobytes())
        return Source(in_memory(images), labels, name="arrays", fingerprint=digest.hexdigest())
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        fix = "give a file, (images, labels), or an object with __len__ and items (image, label)"
        fix = "give loader.dataset" if hasattr(dataset, "dataset") else fix
        raise UsageError(f"{str(dataset)[:80]} is no source", fix=fix)
    return _of_items(dataset, options)


# --- Hugging Face data sets ----------------------------------------------------------------------------------------


def load_hub(name: str, config: str | None, options: Options) -> Source:
    """Open a data set of the Hugging Face hub (from its cache when offline), or one that ``save_to_disk`` wrote."""
    split = options.split or "train"
    where = f"hf:{name}:{split}"
    if not Path(name).exists():
        offline_without_hub()
    try:
        import datasets
    except ImportError:
        raise UsageError(f"hf:{name} needs the package datasets", fix="pip install 'puma-robust[hub]'") from None
    try:
        if Path(name).is_dir() and any((Path(name) / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            table = datasets.load_from_disk(name)
            several = isinstance(table, datasets.DatasetDict)
            table = table[chosen_split(name, split, list(table))] if several else table
        else:
            table = datasets.load_dataset(name, config, split=split)
    except UsageError:
        raise
    except Exception as error:  # whatever the package raises: network, cache, scripts, formats
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        get = f"hf download {name} --repo-type dataset --local-dir {Path(name).name}"
        fix = f"check the name and the split; where there is a network: {get}"
        raise DataError(f"{where} cannot be opened", why=why, fix=fix) from None
    source = _of_table(table, where, options)
    source.name = f"{Path(name).name}-{split}"
    return source


def _of_table(table: Any, where: str, options: Options) -> Source:
    from datasets import ClassLabel, Image

    table, features = table.with_format(None), table.features
    # a struct of bytes and path is what an Image becomes in a Parquet file without the metadata of the hub
    encoded = [name for name, kind in features.items() if isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()]
    image = next(iter([column for column, kind in features.items() if isinstance(kind, Image)] + encoded), None)
    if image is None:
        fix = "data.cast_column(NAME, datasets.Image()) makes one of encoded files"
        raise DataError(f"{where} has no image column", why=f"it has: {features}", fix=fix)
    whole = [column for column, kind in features.items() if "label" in column and "int" in getattr(kind, "dtype", "")]
    named = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    label = chosen_label(list(features), whole + named, options.label, where)
    names = getattr(features[label], "names", None)
    labels = np.asarray(table.select_columns([label]).with_format("numpy")[:][label])
    values = check_labels(labels, len(table), f"{where}: {label}", names)
    raw = table.select_columns([image]).cast_column(image, Image(decode=False))
    fetch = partial(_read_cell, raw, image, where)
    digest = hashlib.sha256(values.astype("<i8").tobytes())
    for row in _sampled(len(table), options.verify).tolist():
        digest.update(fetch(row)[0])
    images = EncodedImages(fetch, len(table), options)
    return Source(images, values, name=where, fingerprint=digest.hexdigest(), class_names=names)


def _read_cell(table: Any, column: str, name: str, row: int) -> tuple[bytes, str]:
    item, where = table[row][column], f"{name}: {column}, row {row:,}"
    try:
        return item["bytes"] or Path(item["path"]).read_bytes(), where
    except (TypeError, OSError) as error:
        raise DataError(f"{where} holds no image", why=str(error)) from None


# --- map-style datasets --------------------------------------------------------------------------------------------


def _of_items(dataset: MapStyle, options: Options) -> Source:
    """A dataset of ``(image, label)``; labels are its ``labels`` or ``targets``, else read by going through it once."""
    called, size = type(dataset).__name__.lower(), len(dataset)
    if not size:
        raise DataError(f"{called} is empty")
    items = _Items(dataset, called, options)
    check_image_layout(items.shape, np.dtype(np.uint8), None, called)
    rows = _sampled(size, options.verify)
    twice = {row: items.item(row) for row in rows[:: max(1, len(rows) // _TWICE)].tolist()}

    def check_same() -> None:
        for row, (one, label) in twice.items():
            two, again = items.item(row)
            if label != again or not np.array_equal(one, two):
                which = "image" if label == again else "label"
                what = f"{called}: item {row:,} is another {which} each time it is read"
                fix = "take the dataset without augmentation: recipes augment by themselves"
                raise DataError(what, why="a random transform; margins belong to fixed images", fix=fix)

    check_same()
    stated: list[Any] = [getattr(dataset, name, None) for name in ("labels", "targets")]
    values = next((_plain(found) for found in stated if hasattr(found, "__len__") and len(found) == size), None)
    labels = np.empty(size, np.int64) if values is None else check_labels(values, size, f"{called}: labels")
    covered, digest = set(rows.tolist()), hashlib.sha256(repr(items.shape).encode())
    for row in range(size) if values is None else rows.tolist():
        image, label = items.item(row)
        if values is None:
            labels[row] = label
        elif label != labels[row]:
            raise DataError(f"{called}: item {row:,} has label {label}; its labels or targets says {labels[row]}")
        if row in covered:
            digest.update(image.tobytes())
    check_same()  # a third time: some change only now and then
    labels = check_labels(labels, size, called)
    digest.update(labels.astype("<i8").tobytes())
    _warn_rounded(called, items.rounded)
    named = names if len(names := _class_names(dataset)) > int(labels.max()) else None
    return Source(items, labels, name=called, fingerprint=digest.hexdigest(), class_names=named)


def _class_names(dataset: Any) -> tuple[str, ...]:
    """What ``dataset`` calls its classes, if anything; torch's wrappers keep labels, other classes may change them."""
    from torch.utils.data import ConcatDataset, Subset

    if type(dataset) in (ConcatDataset, Subset):
        parts = getattr(dataset, "datasets", None) or [dataset.dataset]
        several = sorted({names for part in parts if (names := _class_names(part))})
        if len(several) > 1:
            fix = "puma.Pool([...]) of the parts matches classes by name (roles= says which are real)"
            why = f"{several[0]} and {several[1]}"
            raise DataError("the parts of a ConcatDataset number their classes differently", why=why, fix=fix)
        return several[0] if several else ()
    stated = (getattr(dataset, name, None) for name in ("classes", "class_names"))
    return tuple(map(str, next((names for names in stated if names is not None), ())))


class _Items(Images):
    """Checked images of a map-style dataset."""

    def __init__(self, dataset: MapStyle, name: str, options: Options) -> None:
        self._dataset, self._name, self._options, self.rounded = dataset, name, options, False
        super().__init__((len(dataset), *self.item(0)[0].shape), slow=True)

    def item(self, row: int) -> tuple[Pixels, int]:
        """An image and its label."""
        where = f"{self._name}: item {row:,}"
        try:
            item = self._dataset[row]
        except Exception as error:
            raise DataError(f"{where} cannot be read", why=f"{type(error).__name__}: {error}"[:200]) from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where} is a {type(item).__name__}", why="items are pairs (image, label)")
        image, label = item
        if isinstance(image, Image.Image):
            pixels = picture_pixels(image, where)
        else:
            if (array := _plain(image)).ndim not in (2, 3):
                raise DataError(f"{where}: the image has shape {array.shape}", why="images are uint8 [H, W, C]")
            batch, rounded = _pixels(image[None], f"{where}: the image (with a batch axis)")
            pixels, self.rounded = batch[0], self.rounded or rounded
        number = _plain(label)
        if number.size != 1 or number.dtype.kind not in "iu":
            raise DataError(f"{where}: the label is {label!r}", why="labels are class numbers")
        pixels = fitted(pixels, self._options)
        if row and pixels.shape != self.shape[1:]:  # which is that of item 0
            seen = f"{where} has shape {pixels.shape}, item 0 has {self.shape[1:]}"
            raise DataError(seen, why="all images of a source have one shape", fix="resize=32, channels=3")
        return pixels, int(number.reshape(()))

    def read(self, rows: Rows) -> Pixels:
        """See `puma.data.source.Images.read`."""
        return np.array([self.item(row)[0] for row in rows.tolist()], np.uint8).reshape(-1, *self.shape[1:])


def _sampled(size: int, verify: str) -> Rows:
    """The rows that a fingerprint covers: 256 spread over all, every one with ``verify="full"``."""
    return np.arange(size) if verify == "full" else np.unique(np.linspace(0, size - 1, _SAMPLED).astype(np.int64))


def _plain(values: Any) -> NDArray[Any]:
    """An array of numpy, of a tensor too wherever it lies."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _pixels(values: Any, where: str) -> tuple[Pixels, bool]:
    """Images ``[N, H, W]``, NHWC or NCHW, uint8 or float in [0, 1], as uint8 NHWC; whether rounding changed them."""
    array, rounded = _plain(values), False
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[1] in (1, 3) and (array.shape[3] not in (1, 3) or hasattr(values, "detach")):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:  # false where one is NaN
        scaled = array.astype(np.float64) * 255
        array = np.rint(scaled)
        rounded = bool(np.abs(scaled - array).max() > 0.01)
        array = array.astype(np.uint8)
    check_image_layout(array.shape, array.dtype, array, where)
    return np.ascontiguousarray(array), rounded


def _warn_rounded(name: str, rounded: bool) -> None:
    if rounded:
        logger.warning("%s: float images are rounded to the nearest k/255 (off by up to 1/510)", name)
