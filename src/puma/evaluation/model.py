"""The model under evaluation: eval mode, true float32, a count of its passes, a check of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from puma.errors import ModelError
from puma.models.checks import apply_model
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
        logits = apply_model(self.model, images)
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
