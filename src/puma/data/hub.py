"""Hugging Face data sets, ``hf:NAME:SPLIT``, through the optional ``datasets`` package."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from puma.data.encoded import EncodedImages, fitted
from puma.data.images import Rows, remembered
from puma.data.layout import LABEL_NAMES, check_labels
from puma.data.source import ImageSource
from puma.errors import DataError, UsageError, unknown

_SAMPLED = 256


def load_hub(
    name: str, split: str = "train", *, verify: str = "free", resize: int | None = None, channels: int | None = None
) -> ImageSource:
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

    features = table.features
    image = next((column for column, kind in features.items() if isinstance(kind, Image)), None)
    label = next((column for column, kind in features.items() if isinstance(kind, ClassLabel)), None)
    label = label or next((column for column in LABEL_NAMES if column in features), None)
    if image is None or label is None:
        raise DataError(f"hf:{name}:{split} has no {'label' if image else 'image'} column", why=f"it has: {features}")
    names = getattr(features[label], "names", None)
    labels = np.asarray(table.select_columns([label]).with_format("numpy")[:][label])
    values = check_labels(labels, len(table), f"hf:{name}:{split}: {label}", names)
    fetch = HubBytes(table.select_columns([image]).cast_column(image, Image(decode=False)), image)
    first = fitted(fetch(np.array([0]))[0], f"hf:{name}:{split}, row 0", resize, channels)
    sampled = (
        np.arange(len(table)) if verify == "full" else np.unique(np.linspace(0, len(table) - 1, _SAMPLED).astype(int))
    )
    digest = hashlib.sha256(values.astype("<i8").tobytes())
    for row in sampled:
        digest.update(fetch(np.array([row]))[0])
    return ImageSource(
        remembered(EncodedImages(fetch, (len(table), *first.shape), f"hf:{name}:{split}", resize, channels)),
        values,
        name=f"{Path(name).name}-{split}",
        fingerprint=digest.hexdigest(),
        class_names=names,
    )


class HubBytes:
    """The encoded images of a data set by row."""

    def __init__(self, table: Any, column: str) -> None:
        self._table, self._column = table, column

    def __call__(self, rows: Rows) -> list[Any]:
        """The bytes at ``rows``.

        Raises:
            DataError: a row without an image, or whose file has vanished.
        """
        out = []
        for row, item in zip(rows, self._table[[int(row) for row in rows]][self._column], strict=True):
            try:
                data = item["bytes"] or Path(item["path"]).read_bytes()
            except (TypeError, OSError) as error:
                raise DataError(f"{self._column}, row {row:,} holds no image", why=str(error)) from None
            out.append(data)
        return out


def _opened(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(f"hf:{name} needs the package datasets", fix="pip install 'puma-robust[hub]'") from None
    try:
        if Path(name).is_dir() and any((Path(name) / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)
            if not isinstance(found, datasets.DatasetDict):
                return found
            if split not in found:
                raise unknown("split", split, list(found))
            return found[split]
        return datasets.load_dataset(name, split=split)
    except UsageError:
        raise
    except Exception as error:  # whatever the package raises: network, cache, scripts, formats
        raise DataError(
            f"hf:{name}:{split} cannot be opened",
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            fix="check the name and the split; without network it has to lie in the cache, or name a Parquet file",
        ) from None
