"""Networks by name, from a seed: the same name, options and seed give the same weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from puma.errors import UsageError, unknown
from puma.models.layers import CIFAR10_MEAN, CIFAR10_STD
from puma.models.preactresnet import PreActResNet
from puma.models.smallcnn import SmallCNN
from puma.models.wideresnet import WideResNet

NAMES = ("small-cnn", "wrn-D-K", "preactresnet-18", "preactresnet-34")
_OPTIONS = {
    "small-cnn": {"activation", "norm", "widths"},
    "wrn": {"activation", "padding"},
    "preactresnet": {"activation", "padding"},
}


def build_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Build a network that takes float images ``[B, C, H, W]`` in [0, 1] and returns logits ``[B, num_classes]``.

    Args:
        name: ``"small-cnn"``, ``"wrn-D-K"`` (for example ``"wrn-28-10"``), ``"preactresnet-18"`` or
            ``"preactresnet-34"``.
        num_classes: at least 2.
        in_channels: image channels.
        image_size: height and width in pixels.
        mean: channel means for the normalisation inside; default CIFAR-10's for three channels, else 0.5.
        std: channel standard deviations, likewise.
        seed: the weights' seed; the global generators are not touched.
        **options: ``activation="relu"|"silu"``; ``padding`` of the residual networks; ``norm`` and ``widths`` of
            ``small-cnn``.

    Returns:
        The model, with ``model.config``: everything needed to build it again, as a JSON value.

    Raises:
        UsageError: unknown name or option, or sizes the network cannot take.

    >>> model = build_model("small-cnn", 10, in_channels=1, image_size=8)
    >>> sum(parameter.numel() for parameter in model.parameters())
    19178
    """
    family, construct = _architecture(name)
    for option in options:
        if option not in _OPTIONS[family]:
            raise unknown(f"option of {name}", option, _OPTIONS[family])
    if num_classes < 2:
        raise UsageError(f"num_classes {num_classes} is not a classification", fix="at least two classes")
    if image_size < 8 or in_channels < 1 or (family == "small-cnn" and image_size > 35):
        raise UsageError(
            f"{name} does not take {in_channels} x {image_size} x {image_size} images",
            fix="8 pixels or more (small-cnn: up to 35)",
        )
    if mean is None:
        mean = CIFAR10_MEAN if in_channels == 3 else (0.5,) * in_channels
    if std is None:
        std = CIFAR10_STD if in_channels == 3 else (0.5,) * in_channels
    if len(mean) != in_channels:
        raise UsageError(f"mean {list(mean)} has not one value for each of {in_channels} channels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = construct(num_classes, in_channels, image_size, mean=mean, std=std, **options)
    settings = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    config = {"name": name, **settings, "mean": list(mean), "std": list(std), **options}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    object.__setattr__(model, "config", plain)  # nn.Module declares its attributes as tensors and modules only
    return model


def _architecture(name: str) -> tuple[str, Callable[..., nn.Module]]:
    if name == "small-cnn":
        return name, SmallCNN
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, width = int(match[1]), int(match[2])
        return "wrn", lambda classes, channels, _, **options: WideResNet(depth, width, classes, channels, **options)
    if match := re.fullmatch(r"preactresnet-(18|34)", name):
        depth = int(match[1])
        return "preactresnet", lambda classes, channels, _, **options: PreActResNet(depth, classes, channels, **options)
    raise unknown("model", name, NAMES)
