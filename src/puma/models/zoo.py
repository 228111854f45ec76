"""Networks by spec: run folders, weights files, factories of a user's module, published models by name.

RobustBench (github.com/RobustBench/robustbench) loads a state dict with exactly its own keys. Its `DMWideResNet` and
`DMPreActResNet` normalise inside and pad like TensorFlow; its `WideResNet` does neither. Files are read without running
code (``torch.load(weights_only=True)``, safetensors), and nothing is downloaded unless a package does it.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from puma.errors import ModelError, UsageError, unknown
from puma.io import offline_without_hub
from puma.models.networks import build_model
from puma.models.weights import load_model, load_weights, read_safetensors


def resolve_model(
    spec: str | Path, weights: str | Path | None = None, *, new_head: bool = False, **options: Any
) -> nn.Module:
    """Build the model that ``spec`` names.

    Args:
        spec: a weights file or run folder; ``"package.module:factory"`` (called without arguments); a name of
            `build_model`; or a published model, in eval mode, from [0, 1] pixels to logits. ``"robustbench:NAME"`` is
            the file ``NAME.pt`` somewhere in ``$PUMA_MODELS``, else in ``models``, where RobustBench keeps it
            (``"robustbench:cifar10/Linf/NAME"`` chooses among several); ``"timm:NAME"`` and ``"torchvision:NAME"`` are
            pretrained models with their normalisation put inside; ``"hf:REPO"`` is what ``puma export hub`` wrote.
        weights: safetensors file, or the folder of a run, which stands for its last model; ``.pt`` of a published one.
        new_head: leave the last layer as built where the weights are for other classes.
        **options: for `build_model`; the others do without.

    `ModelError`: no such module, factory, file or run, or several files; the factory fails; the weights do not fit.
    """
    text = str(spec)
    if Path(text).exists() and weights is None:
        return load_model(text)
    kind, _, name = text.partition(":")
    if kind == "robustbench":
        return _load_robustbench(name, weights)
    if kind == "hf":
        return _load_hub(name, weights)
    if kind in ("timm", "torchvision"):
        return _load_pretrained(kind, name, weights)
    if name:
        model = _call_factory(text)
    elif Path(text).suffix == ".safetensors" or "/" in text:
        raise ModelError(f"weights {text} do not exist")
    elif "num_classes" not in options:
        why = "a model is a weights file, the folder of a finished run, or package.module:factory"
        raise ModelError(f"there is no model at {text}", why=why, fix="train one with `puma train`")
    else:
        model = build_model(text, **options)
    if weights is not None:
        file = Path(weights) / "last.safetensors" if Path(weights).is_dir() else weights
        load_weights(model, read_safetensors(file)[0], file, new_head=new_head)
        model.eval()
    return model


def _call_factory(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own file beside the command; never in place of an installed module
    try:
        model = getattr(importlib.import_module(module_name), factory_name)()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot find the factory {spec!r}", why=str(error), fix='"package.module:factory"') from error
    except Exception as error:  # whatever a user's code raises
        raise ModelError(f"the factory {spec!r} failed", why=f"{type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


class Normalised(nn.Module):
    """A network that expects images normalised by ``mean`` and ``std`` of each channel, as one of [0, 1] pixels."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = (nn.Buffer(torch.tensor(values).view(-1, 1, 1)) for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of float images ``[B, C, H, W]`` in [0, 1]."""
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


def _load_pretrained(kind: str, name: str, weights: str | Path | None) -> nn.Module:
    package = _package("timm" if kind == "timm" else "torchvision.models")
    try:
        if kind == "timm":
            model = package.create_model(name, pretrained=weights is None)
            mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        else:
            model = package.get_model(name, weights="DEFAULT" if weights is None else None)
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"{kind} has no model {name!r} here", why=_first_line(error)) from None
    if weights is not None:
        load_weights(model, _read_weights(Path(weights)), weights)
    return Normalised(model, mean, std).eval()


def _load_hub(name: str, weights: str | Path | None) -> nn.Module:
    hub = _package("huggingface_hub", '"puma-robust[hub]"')
    offline_without_hub()
    try:
        return load_model(hub.hf_hub_download(name, "model.safetensors") if weights is None else weights)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors and ValueErrors
        fix = f"check the name; where there is a network: hf download {name}"
        raise ModelError(f"cannot load hf:{name}", why=_first_line(error), fix=fix) from None


def _package(name: str, requirement: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: torchvision that was built for another torch
        top = name.partition(".")[0]
        what, fix = f"{top} is not installed", f"pip install {requirement or top}"
        if not isinstance(error, ImportError):
            what, fix = f"{top} cannot be imported", "pip install --upgrade torch torchvision"
        raise UsageError(what, why=_first_line(error), fix=fix) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pt`` file; of the latter nothing but tensors and plain values is read."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"cannot read {path}", why=_first_line(error), fix="download it again") from None
    for key in ("state_dict", "model_state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no weights", why="a dictionary of tensors is needed, or one under 'state_dict'")
    return content


# --- RobustBench ---------------------------------------------------------------------------------------------------

Architecture = Literal["WideResNet", "DMWideResNet", "DMPreActResNet"]

# our names of layers and those of WideResNet; the other two classes carry ours already
_OUTER = {"init_conv": "conv1", "batchnorm": "bn1", "logits": "fc"}
_INNER = {"batchnorm_0": "bn1", "conv_0": "conv1", "batchnorm_1": "bn2", "conv_1": "conv2", "shortcut": "convShortcut"}
# of the class WideResNet with something around it that the weights do not show
_NOT_PLAIN = re.compile(r"Hendrycks|Rice2020|Ding2020|Augustin2020|Rony2019|Chen2020")
_WRAPPED = re.compile(r"^(module\.)?(model\.)?")
_CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


class RobustBenchModel(NamedTuple):
    """A network as RobustBench builds it: class, the constructor's arguments by its names, and weights by its keys."""

    architecture: Architecture
    arguments: dict[str, Any]
    weights: dict[str, Tensor]


def _load_robustbench(name: str, weights: str | Path | None) -> nn.Module:
    """A model of RobustBench from its file, where the architecture is one of ours."""
    root, short = Path(os.environ.get("PUMA_MODELS") or "models"), name.rpartition("/")[2]
    files = [Path(weights)] if weights else sorted(root.glob(f"{name}.pt" if "/" in name else f"**/{name}.pt"))
    if len(files) > 1:
        fix = f"name one of them, as in robustbench:cifar10/Linf/{name}"
        raise ModelError(f"there are several files of {name}: {', '.join(map(str, files))}", fix=fix)
    if not files:
        get = f"from robustbench.utils import load_model; load_model('{short}')"
        why = "published weights are not downloaded by PUMA; RobustBench's package does it"
        fix = f'pip install robustbench && python -c "{get}"'
        raise ModelError(f"there is no {short}.pt in {root}", why=why, fix=fix)
    plain = {_WRAPPED.sub("", key): value for key, value in _read_weights(files[0]).items() if "sub_block1" not in key}
    try:
        architecture, network, options = _architecture_of(plain)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError):
        architecture = ""
    if not architecture or (architecture == "WideResNet" and _NOT_PLAIN.search(name)):
        why = "known are RobustBench's WideResNet, DMWideResNet and DMPreActResNet without anything around them"
        fix = "write a function that builds it and name it: package.module:function"
        raise ModelError(f"{name} is not a network that is known here by its weights alone", why=why, fix=fix)
    return from_robustbench(architecture, plain, network, **options)


def _architecture_of(plain: Mapping[str, Tensor]) -> tuple[str, str, dict[str, Any]]:
    """RobustBench's class, our name and options, from the names and shapes of the weights."""

    def blocks(pattern: str) -> int:
        return max(int(found[1]) for key in plain if (found := re.match(pattern, key))) + 1

    classes = len(plain["logits.bias" if "logits.bias" in plain else "fc.bias"])
    stem = next((key for key in ("conv1.weight", "init_conv.weight", "conv_2d.weight") if key in plain), "")
    options: dict[str, Any] = {"num_classes": classes, "in_channels": plain[stem].shape[1]}
    if stem == "conv1.weight":
        width = len(plain["block1.layer.0.conv1.weight"]) // 16
        return "WideResNet", f"wrn-{6 * blocks(r'block1.layer.([0-9]+)[.]') + 4}-{width}", options
    options["activation"] = "silu"  # of every network of these classes in RobustBench
    if classes == 100:  # their normalisation is not among the weights
        options |= _CIFAR100
    if stem == "init_conv.weight":
        width = len(plain["layer.0.block.0.conv_0.weight"]) // 16
        return "DMWideResNet", f"wrn-{6 * blocks(r'layer.0.block.([0-9]+)[.]') + 4}-{width}", options
    return "DMPreActResNet", f"preactresnet-{18 if blocks(r'layer_0.([0-9]+)[.]') == 2 else 34}", options


def to_robustbench(model: nn.Module) -> RobustBenchModel:
    """Describe a network of `build_model` by RobustBench's names; `ModelError` where no class computes the same."""
    config: dict[str, Any] = getattr(model, "config", None) or {}
    name, weights = str(config.get("name", type(model).__name__)), dict(model.state_dict())
    found = re.fullmatch(r"(wrn|preactresnet)-(\d+)-?(\d*)", name)
    if found and config["image_size"] == 32:
        depth, width, classes, channels = (
            int(found[2]),
            int(found[3] or 0),
            config["num_classes"],
            config["in_channels"],
        )
        activation = {"relu": "ReLU", "silu": "SiLU"}[config.get("activation", "silu")]
        mean, std = config["mean"], config["std"]
        if config.get("padding", "same") == "same":
            inside = {"mean": mean, "std": std, "num_input_channels": channels}
            arguments = {"depth": depth, "width": width, "num_classes": classes, "activation_fn": activation, **inside}
            return RobustBenchModel("DMWideResNet" if width else "DMPreActResNet", arguments, weights)
        if width and (activation, set(mean), set(std), channels) == ("ReLU", {0}, {1}, 3):
            arguments = {"depth": depth, "widen_factor": width, "num_classes": classes}
            return RobustBenchModel("WideResNet", arguments, {_their_key(key): weights[key] for key in weights})
    why = "it knows WRN and PreActResNet of 32 pixels: padding 'same', or WRN with 'symmetric', ReLU, mean 0 and std 1"
    raise ModelError(f"RobustBench has no class for {name} {config}", why=why)


def from_robustbench(architecture: str, weights: Mapping[str, Tensor], name: str, **options: Any) -> nn.Module:
    """Build the network ``name`` of `build_model`, with its options, from weights with RobustBench's keys.

    ``mean`` and ``std`` among the weights are taken as the normalisation; a leading ``module.`` or ``model.`` is
    dropped. `UsageError` for an unknown architecture; `ModelError` names keys or shapes that do not fit.
    """
    if architecture not in get_args(Architecture):
        raise unknown("RobustBench architecture", architecture, get_args(Architecture))
    plain = {_WRAPPED.sub("", key): value for key, value in weights.items()}
    for buffer in ("mean", "std"):
        if buffer in plain:
            options.setdefault(buffer, tuple(plain.pop(buffer).flatten().tolist()))
    other = architecture == "WideResNet"
    if other:
        options = {"padding": "symmetric", "activation": "relu", "mean": (0.0,) * 3, "std": (1.0,) * 3, **options}
    model = build_model(name, options.pop("num_classes", 10), **options)
    ours = {_their_key(key): key for key in model.state_dict()} if other else {}
    load_weights(model, {ours.get(key, key): value for key, value in plain.items()}, f"weights of {architecture}")
    return model.eval()


def _their_key(key: str) -> str:
    """``layer.0.block.2.conv_0.weight`` is ``block1.layer.2.conv1.weight`` in WideResNet."""
    if found := re.fullmatch(r"layer\.(\d)\.block\.(\d+)\.(\w+)\.(\w+)", key):
        return f"block{int(found[1]) + 1}.layer.{found[2]}.{_INNER[found[3]]}.{found[4]}"
    layer, _, leaf = key.partition(".")
    return f"{_OUTER[layer]}.{leaf}"
