"""The model under evaluation (eval mode, true float32, passes counted) and the test images, whatever holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from puma.data.checks import match_classes
from puma.data.load import as_source
from puma.data.sampler import stratified_rows
from puma.data.source import MapStyle, Source
from puma.errors import DataError, ModelError
from puma.models.checks import apply_model
from puma.models.modes import attack_mode, device_of, true_float32
from puma.models.weights import unwrap

TestData = Source | MapStyle | DataLoader[Any] | str | Path


class CountedNetwork(nn.Module):
    """``model`` with a count of its passes.

    Args:
        model: from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, K]``.
        on_pass: called after each forward pass with its cost.

    ``cost`` is in forward-equivalents: 1 for an image passed forward, 2 with the gradient to the input.
    """

    def __init__(self, model: nn.Module, on_pass: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.model = model
        self.on_pass = on_pass
        self.cost = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        logits = apply_model(self.model, images.clone())  # some models write into their input
        cost = len(images) * (2 if images.requires_grad and torch.is_grad_enabled() else 1)
        self.cost += cost
        if self.on_pass is not None:
            self.on_pass(cost)
        return logits


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While inside: eval mode, weights frozen, true float32 (no TF32, no autocast); everything is restored.

    Raises:
        ModelError: a weight is not float32.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(
                f"the model's weights are {str(tensor.dtype).removeprefix('torch.')} (at {name!r})",
                why="half precision hides gradients from the attacks; accuracies are measured in float32",
                fix="evaluate model.float()",
            )
    with attack_mode(model, "eval"), true_float32(device_of(model).type):
        yield


def check_finite(logits: Tensor) -> None:
    """Refuse logits ``[B, K]`` of test images that are NaN or infinite.

    Raises:
        ModelError: says how many images have such logits.
    """
    if bad := int((~torch.isfinite(logits)).any(1).sum()):
        raise ModelError(
            f"the model's logits are NaN or infinite for {bad} of {len(logits)} test images",
            why="a NaN would count as a wrong class",
            fix="check the weights: training may have diverged",
        )


def open_test_set(dataset: TestData, model: nn.Module) -> Source:
    """The test images, with the model's class numbers where both have class names.

    Raises:
        DataError: not images and labels, or classes that the model does not know.
    """
    source = as_source(_loader_items(dataset) if isinstance(dataset, DataLoader) else dataset)
    names: Any = getattr(unwrap(model), "class_names", None)
    return match_classes(source, names, "the model") if names else source


def attacked_rows(source: Source, subset: int | None) -> NDArray[np.int64]:
    """Rows to attack, ascending: all, or a stratified sample of ``subset``, the same for every model."""
    if subset is None or subset == len(source):
        return np.arange(len(source), dtype=np.int64)
    return stratified_rows(np.asarray(source.labels, dtype=np.int64), subset, 0)


def _loader_items(loader: DataLoader[Any]) -> list[tuple[NDArray[np.uint8], int]]:
    """The images of a loader in the order of its dataset, not shuffled, as uint8 ``[H, W, C]`` with their labels.

    Raises:
        DataError: batches that are not images and labels, or pixels that are not multiples of 1/255.
    """
    if not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None:
        size = loader.batch_size or 256
        loader = DataLoader(loader.dataset, size, num_workers=loader.num_workers, collate_fn=loader.collate_fn)
    items: list[tuple[NDArray[np.uint8], int]] = []
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)):
            raise DataError("the loader's batches are not pairs (images, labels)", fix="give the dataset itself")
        images, labels = batch
        if images.is_floating_point():
            pixels = (images * 255).round()
            if not bool(((images * 255 - pixels).abs() < 0.01).all() & (pixels >= 0).all() & (pixels <= 255).all()):
                raise DataError(
                    "the loader's images are not 8-bit pixels in [0, 1]",
                    why="they are normalised or augmented; the model has to normalise inside",
                    fix="leave only ToTensor() in the transform",
                )
            images = pixels.to(torch.uint8)
        items += zip(images.permute(0, 2, 3, 1).numpy(), (int(label) for label in labels), strict=True)
    return items
