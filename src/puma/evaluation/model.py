"""The model under evaluation: eval mode, true float32, a count of its passes, and checks of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from puma.errors import ModelError
from puma.models.modes import attack_mode, device_of, true_float32


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
        logits: Tensor = self.model(images)
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


def check_logits(logits: Tensor, images: Tensor, highest_label: int) -> None:
    """Refuse an output that is not finite logits for every class.

    Raises:
        ModelError: another shape, NaN or infinite values, or fewer classes than the labels need.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"the model returns {got} for {len(images)} images", why=f"expected logits [{len(images)}, classes]"
        )
    if highest_label >= logits.shape[1]:
        raise ModelError(
            f"the model has {logits.shape[1]} classes but the test set has label {highest_label}",
            why="model and test set do not belong together",
        )
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).any(1).sum())
        raise ModelError(
            f"the model's logits are NaN or infinite for {bad} of {len(images)} test images",
            why="a NaN would count as a wrong class",
            fix="check the weights: training may have diverged",
        )


def check_batch_independence(network: CountedNetwork, images: Tensor) -> None:
    """Refuse a model whose logits for an image depend on the other images of the batch.

    Raises:
        ModelError: logits of an image alone and in a batch differ by more than rounding.
    """
    if len(images) < 2:
        return
    together = network(images)
    alone = torch.cat([network(image.unsqueeze(0)) for image in images])
    gap = float((together - alone).abs().max())
    if gap > 1e-3 * max(1.0, float(together.abs().max())):
        raise ModelError(
            f"the model gives an image other logits alone than in a batch (they differ by {gap:.2g})",
            why="a batch under attack would give other results than its images one by one",
            fix="use BatchNorm's running statistics, and no layer that looks across the batch",
        )
