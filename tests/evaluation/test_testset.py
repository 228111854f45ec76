"""Test images from loaders and texts, and classes that have names."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from puma import load_dataset
from puma.errors import DataError
from puma.evaluation import evaluate
from puma.models.weights import set_class_names


class Items(Dataset[Any]):
    """Test images as torchvision gives them: float [C, H, W] with ToTensor, or uint8."""

    def __init__(self, images: list[Any], floats: bool = True, names: list[str] | None = None) -> None:
        self.images, self.floats = images, floats
        if names is not None:
            self.classes = names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        return (tensor.float() / 255 if self.floats else tensor), label


class Named(Dataset[Any]):
    """A map-style dataset whose classes have names."""

    def __init__(self, images: list[Any], classes: list[str]) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index]


@pytest.mark.parametrize("floats", [True, False])
def test_a_loader_gives_what_its_images_give(network: nn.Module, images: list[Any], floats: bool) -> None:
    expected = evaluate(network, images, "Linf:0.02", attack="pgd-5")
    loader = DataLoader(Items(images, floats), batch_size=7, shuffle=True)  # the order is the dataset's
    result = evaluate(network, loader, "Linf:0.02", attack="pgd-5")
    assert result.broken_by.tolist() == expected.broken_by.tolist()
    assert (
        result.meta["settings"]["dataset"]
        == evaluate(network, loader, "Linf:0.02", attack="clean").meta["settings"]["dataset"]
    )


def test_a_loader_that_normalises_is_refused(network: nn.Module, images: list[Any]) -> None:
    class Normalised(Items):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            image, label = super().__getitem__(index)
            return (image - 0.4914) / 0.2471, label

    with pytest.raises(DataError, match="normalised\\?"):
        evaluate(network, DataLoader(Normalised(images)), "Linf:0.02", attack="clean")
    with pytest.raises(DataError, match="a way of its own"):
        evaluate(network, DataLoader(Items(images), collate_fn=list), "Linf:0.02", attack="clean")
    with pytest.raises(DataError, match="are pairs"):
        evaluate(network, DataLoader([1.0, 2.0]), "Linf:0.02", attack="clean")  # type: ignore[arg-type]


def test_a_text_opens_the_test_set(new_network: Any) -> None:
    model = new_network()
    by_text, by_source = (
        evaluate(model, data, "Linf:0.1", attack="clean")
        for data in ("digits:test?subset=50", load_dataset("digits:test?subset=50"))
    )
    np.testing.assert_array_equal(by_text.clean_correct, by_source.clean_correct)


def test_classes_are_matched_by_name(network: nn.Module, images: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    """A test set whose classes are numbered otherwise, or that has some of them only, is evaluated all the same."""
    names = [f"class {letter}" for letter in "abcdefghij"]
    expected = evaluate(network, images, "Linf:0.02", attack="pgd-5")
    set_class_names(network, names)
    same = evaluate(network, Named(images, names), "Linf:0.02", attack="pgd-5")
    assert "by name" not in caplog.text
    present = sorted({label for _, label in images}, reverse=True)
    renumbered = [(image, present.index(label)) for image, label in images]
    with caplog.at_level(logging.WARNING, "puma"):
        mapped = evaluate(network, Named(renumbered, [names[label] for label in present]), "Linf:0.02", attack="pgd-5")
    assert "by name" in caplog.text
    for result in (same, mapped):
        assert result.broken_by.tolist() == expected.broken_by.tolist()
        np.testing.assert_array_equal(result.label, expected.label)
    with pytest.raises(DataError, match="classes that the model does not have: zebra"):
        evaluate(network, Named(renumbered, ["zebra", *names[1:]]), "Linf:0.02", attack="clean")
    unnamed = evaluate(network, images, "Linf:0.02", attack="pgd-5")  # numbers cannot be compared with names
    assert unnamed.broken_by.tolist() == expected.broken_by.tolist()
