"""A network of `puma.models` as the self-contained ``model.py`` of an export describes it."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from puma.errors import ModelError
from puma.models.robustbench import to_robustbench


def standalone_config(model: nn.Module) -> dict[str, Any]:
    """``architecture`` and the arguments of its class in `puma.export.standalone`; the weights keep their names.

    Raises:
        ModelError: PUMA did not build the model, so nobody knows how to build it again.
    """
    config: dict[str, Any] = dict(getattr(model, "config", None) or {})
    name = str(config.pop("name", ""))
    if name == "small-cnn":
        return {"architecture": "SmallCNN", **config}
    config.pop("image_size", None)
    if found := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return {"architecture": "WideResNet", "depth": int(found[1]), "width": int(found[2]), **config}
    if found := re.fullmatch(r"preactresnet-(\d+)", name):
        return {"architecture": "PreActResNet", "depth": int(found[1]), **config}
    raise ModelError(
        f"{type(model).__name__} cannot be exported",
        why="only networks of puma.build_model are known well enough to be rebuilt without their source",
        fix="share your own source with model.safetensors",
    )


def robustbench_config(model: nn.Module) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """RobustBench's class, its arguments, ours (`standalone_config`), and the weights with RobustBench's keys.

    Raises:
        ModelError: RobustBench has no class that computes the same.
    """
    found = to_robustbench(model)
    if found.architecture == "WideResNet":
        config = {"architecture": "PlainWideResNet", **found.arguments}
    else:
        config = standalone_config(model)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in found.weights.items()}
    return found.architecture, found.arguments, config, weights
