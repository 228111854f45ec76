"""Networks by name: run folders, weights files, factories of a user's module, and RobustBench's key names both ways.

RobustBench (github.com/RobustBench/robustbench) loads a state dict with exactly its own keys. Its `DMWideResNet` and
`DMPreActResNet` normalise inside and pad like TensorFlow; its `WideResNet` does neither.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from puma.errors import ModelError, unknown
from puma.models.networks import build_model
from puma.models.weights import load_model, load_weights, read_safetensors

Architecture = Literal["WideResNet", "DMWideResNet", "DMPreActResNet"]
_NAMES: tuple[Architecture, ...] = ("WideResNet", "DMWideResNet", "DMPreActResNet")

# ours -> WideResNet; the other two carry our names already
_TO_WRN = (
    (r"^init_conv\.", "conv1."),
    (r"^batchnorm\.", "bn1."),
    (r"^logits\.", "fc."),
    (r"^layer\.(\d)\.block\.(\d+)\.", lambda m: f"block{int(m[1]) + 1}.layer.{m[2]}."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.conv_0\.", ".conv1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv_1\.", ".conv2."),
    (r"\.shortcut\.", ".convShortcut."),
)
_FROM_WRN = (
    (r"^conv1\.", "init_conv."),
    (r"^bn1\.", "batchnorm."),
    (r"^fc\.", "logits."),
    (r"^block(\d)\.layer\.(\d+)\.", lambda m: f"layer.{int(m[1]) - 1}.block.{m[2]}."),
    (r"\.bn1\.", ".batchnorm_0."),
    (r"\.conv1\.", ".conv_0."),
    (r"\.bn2\.", ".batchnorm_1."),
    (r"\.conv2\.", ".conv_1."),
    (r"\.convShortcut\.", ".shortcut."),
)


def resolve_model(spec: str | Path, weights: str | Path | None = None, **options: Any) -> nn.Module:
    """Build the model that ``spec`` names.

    Args:
        spec: a weights file or run folder; ``"package.module:factory"`` (called without arguments); or a name of
            `build_model`.
        weights: for a factory or a name: safetensors file, or the folder of a run, which stands for its last model.
        **options: for `build_model`, with a name only.

    Raises:
        ModelError: no such module, factory, file or run; the factory fails; the weights do not fit.
        UsageError: unknown name.
    """
    text = str(spec)
    if Path(text).exists() and weights is None:
        return load_model(text)
    if ":" in text:
        model = _call_factory(text)
    elif Path(text).suffix == ".safetensors" or "/" in text:
        raise ModelError(f"weights {text} do not exist")
    elif "num_classes" not in options:
        raise ModelError(
            f"there is no model at {text}",
            why="a model is a weights file, the folder of a finished run, or package.module:factory",
            fix="train one with `puma train`",
        )
    else:
        model = build_model(text, **options)
    if weights is not None:
        file = Path(weights) / "last.safetensors" if Path(weights).is_dir() else weights
        load_weights(model, read_safetensors(file)[0], file)
        model.eval()
    return model


def _call_factory(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own file beside the command; never in place of an installed module
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        model = factory()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot find the factory {spec!r}", why=str(error), fix='"package.module:factory"') from error
    except Exception as error:  # whatever a user's code raises
        raise ModelError(f"the factory {spec!r} failed", why=f"{type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


# --- RobustBench ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RobustBenchModel:
    """A network as RobustBench builds it.

    Args:
        architecture: class in ``robustbench.model_zoo.architectures``.
        arguments: its constructor's, by RobustBench's names; ``activation_fn`` is ``"ReLU"`` or ``"SiLU"``.
        weights: state dict with RobustBench's keys.
    """

    architecture: Architecture
    arguments: dict[str, Any]
    weights: dict[str, Tensor]


def to_robustbench(model: nn.Module) -> RobustBenchModel:
    """Describe a network of `build_model` by RobustBench's names.

    Raises:
        ModelError: RobustBench has no class that computes the same.
    """
    config: dict[str, Any] = getattr(model, "config", None) or {}
    name, weights = str(config.get("name", type(model).__name__)), model.state_dict()
    activation = {"relu": "ReLU", "silu": "SiLU"}[config.get("activation", "silu")]
    inside: dict[str, Any] = {
        "mean": config.get("mean"),
        "std": config.get("std"),
        "num_input_channels": config.get("in_channels"),
    }
    same = config.get("padding", "same") == "same"
    common = {"num_classes": config.get("num_classes"), "activation_fn": activation, **inside}
    if (found := re.fullmatch(r"wrn-(\d+)-(\d+)", name)) and config.get("image_size") == 32:
        depth, width = int(found[1]), int(found[2])
        if same:
            return RobustBenchModel("DMWideResNet", {"depth": depth, "width": width, **common}, dict(weights))
        plain = activation == "ReLU" and set(inside["mean"]) == {0} and set(inside["std"]) == {1}
        if plain and inside["num_input_channels"] == 3:
            arguments = {"depth": depth, "widen_factor": width, "num_classes": config["num_classes"]}
            return RobustBenchModel("WideResNet", arguments, _renamed(weights, _TO_WRN))
    elif (found := re.fullmatch(r"preactresnet-(\d+)", name)) and same and config.get("image_size") == 32:
        return RobustBenchModel("DMPreActResNet", {"depth": int(found[1]), "width": 0, **common}, dict(weights))
    raise ModelError(
        f"RobustBench has no class for {name} {config}",
        why="it knows WRN and PreActResNet of 32 pixels: padding 'same' (DeepMind's), or WRN with padding 'symmetric', "
        "ReLU, mean 0 and std 1",
    )


def from_robustbench(architecture: str, weights: Mapping[str, Tensor], name: str, **options: Any) -> nn.Module:
    """Build a network from weights with RobustBench's keys; a leading ``module.`` or ``model.`` is dropped.

    Args:
        architecture: ``"WideResNet"``, ``"DMWideResNet"`` or ``"DMPreActResNet"``.
        weights: its state dict (buffers ``mean`` and ``std`` in it are taken as the normalisation).
        name: of `build_model`, such as ``"wrn-28-10"``.
        **options: of `build_model`, such as ``num_classes`` and ``activation``.

    Raises:
        UsageError: unknown architecture.
        ModelError: keys or shapes do not fit; they are named.
    """
    if architecture not in _NAMES:
        raise unknown("RobustBench architecture", architecture, _NAMES)
    plain = {_bare(key): value for key, value in weights.items()}
    for buffer in ("mean", "std"):
        if buffer in plain:
            options.setdefault(buffer, tuple(plain.pop(buffer).flatten().tolist()))
    if architecture == "WideResNet":
        plain = _renamed(plain, _FROM_WRN)
        options = {"padding": "symmetric", "activation": "relu", "mean": (0.0,) * 3, "std": (1.0,) * 3, **options}
    model = build_model(name, options.pop("num_classes", 10), **options)
    load_weights(model, plain, f"weights of {architecture}")
    return model.eval()


def _bare(key: str) -> str:
    for prefix in ("module.", "model."):
        key = key.removeprefix(prefix)
    return key


def _renamed(weights: Mapping[str, Tensor], rules: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        renamed[key] = value
    return renamed
