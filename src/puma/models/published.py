"""Published models by name: RobustBench (its key names both ways), timm, torchvision, Hugging Face.

RobustBench (github.com/RobustBench/robustbench) loads a state dict with exactly its own keys. Its `DMWideResNet` and
`DMPreActResNet` normalise inside and pad like TensorFlow; its `WideResNet` does neither. Files are read without running
code (``torch.load(weights_only=True)``, safetensors), and nothing is downloaded unless a package does it.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from puma.errors import ModelError, UsageError, unknown
from puma.models.networks import build_model
from puma.models.weights import load_model, load_weights, read_safetensors

PUBLISHED = ("robustbench", "timm", "torchvision", "hf")


def load_published(spec: str, weights: str | Path | None = None) -> nn.Module:
    """Build a published model, in eval mode, from [0, 1] pixels to logits.

    Args:
        spec: ``"robustbench:NAME"``: the file ``NAME.pt`` somewhere in ``$PUMA_MODELS``, else in ``models``, where
            RobustBench keeps it; ``"robustbench:cifar10/Linf/NAME"`` chooses among several. ``"timm:NAME"`` and
            ``"torchvision:NAME"``: the package's pretrained model, with its normalisation put inside. ``"hf:REPO"``:
            what ``puma export hub`` wrote.
        weights: file to read instead, ``.pt`` or ``.safetensors``.

    Raises:
        UsageError: the package is not installed.
        ModelError: no file, several, or one that holds no network that is known here.
    """
    kind, _, name = spec.partition(":")
    if kind == "robustbench":
        return _load_robustbench(name, weights)
    if kind == "hf":
        hub = _package("huggingface_hub", "hub")
        try:
            return load_model(hub.hf_hub_download(name, "model.safetensors") if weights is None else weights)
        except (OSError, ValueError) as error:  # the hub's own errors are OSErrors and ValueErrors
            raise ModelError(f"cannot load {spec}", why=str(error).splitlines()[0][:300]) from None
    package = _package("timm" if kind == "timm" else "torchvision.models")
    try:
        if kind == "timm":
            model = package.create_model(name, pretrained=weights is None)
            config = model.pretrained_cfg
            mean, std = config["mean"], config["std"]
        else:
            model = package.get_model(name, weights="DEFAULT" if weights is None else None)
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"{kind} has no model {name!r} here", why=(str(error).splitlines() or [""])[0][:300]) from None
    if weights is not None:
        load_weights(model, _read_weights(Path(weights)), weights)
    return Normalised(model, mean, std).eval()


class Normalised(nn.Module):
    """A network that expects normalised images, as one that takes [0, 1] pixels.

    Args:
        model: the network.
        mean: of each channel.
        std: of each channel.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of float images ``[B, C, H, W]`` in [0, 1]."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


# --- RobustBench ---------------------------------------------------------------------------------------------------

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
# of the class WideResNet with something around it that the weights do not show
_NOT_PLAIN = re.compile(r"Hendrycks|Rice2020|Ding2020|Augustin2020|Rony2019|Chen2020")


def _load_robustbench(name: str, weights: str | Path | None) -> nn.Module:
    """A model of RobustBench from its file; through its package where the architecture is not one of ours."""
    roots = [Path(os.environ["PUMA_MODELS"])] if os.environ.get("PUMA_MODELS") else [Path("models")]
    pattern = f"{name}.pt" if "/" in name else f"**/{name}.pt"
    files = [Path(weights)] if weights else sorted(path for root in roots for path in root.glob(pattern))
    if len(files) > 1:
        raise ModelError(
            f"there are several files of {name}: {', '.join(map(str, files))}",
            fix=f"name one of them, as in robustbench:cifar10/Linf/{name}",
        )
    if not files:
        short = name.rpartition("/")[2]
        get = f"from robustbench.utils import load_model; load_model('{short}')"
        raise ModelError(
            f"there is no {short}.pt in {roots[0]}",
            why="published weights are not downloaded by PUMA; RobustBench's package does it",
            fix=f'pip install robustbench && python -c "{get}"',
        )
    plain = {_bare(key): value for key, value in _read_weights(files[0]).items() if "sub_block1" not in key}
    try:
        architecture, network, options = _architecture_of(plain)
    except (KeyError, IndexError, AttributeError):
        architecture = ""
    if not architecture or (architecture == "WideResNet" and _NOT_PLAIN.search(name)):
        raise ModelError(
            f"{name} is not a network that is known here by its weights alone",
            why="known are RobustBench's WideResNet, DMWideResNet and DMPreActResNet without anything around them",
            fix="write a function that builds it and name it: package.module:function",
        )
    return from_robustbench(architecture, plain, network, **options)


def _architecture_of(plain: Mapping[str, Tensor]) -> tuple[str, str, dict[str, Any]]:
    """RobustBench's class, our name and options, from the names and shapes of the weights."""
    options: dict[str, Any] = {"num_classes": len(plain["logits.bias" if "logits.bias" in plain else "fc.bias"])}
    if "conv1.weight" in plain and "block1.layer.0.conv1.weight" in plain:
        options["in_channels"] = plain["conv1.weight"].shape[1]
        depth = 6 * _count(plain, r"block1\.layer\.(\d+)\.") + 4
        width = len(plain["block1.layer.0.conv1.weight"]) // 16
        return "WideResNet", f"wrn-{depth}-{width}", options
    options["activation"] = "silu"  # of every network of these classes in RobustBench
    if options["num_classes"] == 100:  # their normalisation is not among the weights
        options |= {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
    if "init_conv.weight" in plain:
        options["in_channels"] = plain["init_conv.weight"].shape[1]
        depth = 6 * _count(plain, r"layer\.0\.block\.(\d+)\.") + 4
        width = len(plain["layer.0.block.0.conv_0.weight"]) // 16
        return "DMWideResNet", f"wrn-{depth}-{width}", options
    options["in_channels"] = plain["conv_2d.weight"].shape[1]
    depth = 18 if _count(plain, r"layer_0\.(\d+)\.") == 2 else 34
    return "DMPreActResNet", f"preactresnet-{depth}", options


def _count(plain: Mapping[str, Tensor], pattern: str) -> int:
    """How many blocks a group has."""
    return max(int(found[1]) for key in plain if (found := re.match(pattern, key))) + 1


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pt`` file; of the latter nothing but tensors and plain values is read."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path)[0])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"cannot read {path}",
            why=(str(error).splitlines() or [type(error).__name__])[0][:300],
            fix="download it again",
        ) from None
    for key in ("state_dict", "model_state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no weights", why="a dictionary of tensors is needed, or one under 'state_dict'")
    return content


def _package(name: str, extra: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        fix = f'pip install "puma-robust[{extra}]"' if extra else f"pip install {top}"
        raise UsageError(f"{top} is not installed", why=str(error), fix=fix) from None


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
