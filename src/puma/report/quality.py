"""The measured quality of synthetic images as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = list[Any]

_MEASURES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("label kept: accuracy of a classifier trained on real images", ("label_agreement",), ("real_accuracy",)),
    ("usefulness: accuracy on real test images of a classifier trained on these",
     ("synthetic_trained_accuracy",), ("real_accuracy",)),
    ("mean distance to the nearest training image",
     ("neighbor", "synthetic_to_train", "mean"), ("neighbor", "test_to_train", "mean")),
    ("least distance to a training image",
     ("neighbor", "synthetic_to_train", "least"), ("neighbor", "test_to_train", "least")),
    ("copies: share nearer to a training image than all but 1 % of test images", ("neighbor", "copies"), ()),
    ("coverage of the real images, mean over classes", ("coverage", "synthetic"), ("coverage", "test")),
    ("Frechet distance to the training images", ("frechet", "synthetic"), ("frechet", "test")),
)  # fmt: skip


def quality_rows(quality: Mapping[str, Any]) -> list[Row]:
    """Rows of measure, synthetic, real: those of `puma.generation.quality`, or every number of a foreign measurement.

    >>> quality_rows({"label_agreement": 0.99, "real_accuracy": 0.98})
    [['label kept: accuracy of a classifier trained on real images', 0.99, 0.98]]
    >>> quality_rows({"mine": {"score": 2}})
    [['mine: score', 2, None]]
    """
    rows = [[words, _number(quality, one), _number(quality, two)] for words, one, two in _MEASURES]
    known = [row for row in rows if row[1] is not None]
    return known or _all_numbers(quality)


def _number(quality: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    """The number at a path; the mean where there is one for each class."""
    value: Any = quality if path else None
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        numbers = [float(entry) for entry in value.values() if isinstance(entry, int | float)]
        return sum(numbers) / len(numbers) if numbers else None
    return float(value) if isinstance(value, int | float) else None


def _all_numbers(quality: Mapping[str, Any], prefix: str = "") -> list[Row]:
    rows: list[Row] = []
    for name, value in quality.items():
        words = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _all_numbers(value, f"{words}: ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append([words, value, None])
    return rows
