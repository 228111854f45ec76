"""Networks by spec: run folders, weights files, factories of a user's module, published models by name.

Files are read without running code (``torch.load(weights_only=True)``, safetensors), and nothing is downloaded unless a
package does it.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from puma.errors import ModelError, UsageError
from puma.io import offline_without_hub
from puma.models.networks import Normalise, build_model
from puma.models.weights import load_model, load_weights, read_safetensors


def resolve_model(
    spec: str | Path, weights: str | Path | None = None, *, new_head: bool = False, **options: Any
) -> nn.Module:
    """Build the model that ``spec`` names.

    Args:
        spec: a weights file or run folder; ``"package.module:factory"`` (called without arguments); a name of
            `build_model`; or a published model, in eval mode, from [0, 1] pixels to logits. ``"robustbench:NAME"`` is
            the file ``NAME.pt`` in ``$PUMA_MODELS`` or ``models`` (``"robustbench:cifar10/Linf/NAME"``: of several);
            ``"timm:NAME"`` and ``"torchvision:NAME"`` are pretrained models with their normalisation put inside;
            ``"hf:REPO"`` is what ``puma export hub`` wrote.
        weights: safetensors file, or the folder of a run, which stands for its last model; ``.pt`` of a published one.
        new_head: leave the last layer as built where the weights are for other classes.
        **options: for `build_model`; the others do without.

    `ModelError`: no such module, factory, file or run, or several; the factory fails; the weights do not fit.
    """
    text = str(spec)
    if Path(text).exists() and weights is None:
        return load_model(text)
    weights = Path(weights) / "last.safetensors" if weights is not None and Path(weights).is_dir() else weights
    kind, _, name = text.partition(":")
    if kind in _PUBLISHED:
        return _PUBLISHED[kind](name, weights)
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
        load_weights(model, read_safetensors(weights)[0], weights, new_head=new_head)
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


def _load_pretrained(package: str, name: str, weights: str | Path | None) -> nn.Module:
    module = _package(package)
    try:
        if package == "timm":
            model = module.create_model(name, pretrained=weights is None)
            mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        else:
            model = module.get_model(name, weights="DEFAULT" if weights is None else None)
            mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"{package.partition('.')[0]} has no model {name!r} here", why=_first_line(error)) from None
    if weights is not None:
        load_weights(model, _read_weights(Path(weights)), weights)
    return nn.Sequential(OrderedDict(normalise=Normalise(mean, std), model=model)).eval()


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

_WRAPPED = re.compile(r"^(module\.)?(model\.)?")
_CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


class RobustBenchModel(NamedTuple):
    """A network as RobustBench builds it: class, the constructor's arguments by its names, and weights by its keys."""

    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]


def _load_robustbench(name: str, weights: str | Path | None) -> nn.Module:
    """A model of RobustBench from its file, where the architecture is one of ours."""
    root, short = Path(os.environ.get("PUMA_MODELS") or "models"), name.rpartition("/")[2]
    files = [Path(weights)] if weights else sorted(root.glob(f"**/{name}.pt"))
    if len(files) > 1:
        fix = f"name one of them, as in robustbench:cifar10/Linf/{name}"
        raise ModelError(f"there are several files of {name}: {', '.join(map(str, files))}", fix=fix)
    if not files:
        get = f"from robustbench.utils import load_model; load_model('{short}')"
        why = "published weights are not downloaded by PUMA; RobustBench's package does it"
        fix = f'pip install robustbench && python -c "{get}"'
        raise ModelError(f"there is no {short}.pt in {root}", why=why, fix=fix)
    plain = {_WRAPPED.sub("", key): value for key, value in _read_weights(files[0]).items()}
    try:
        network, options = _architecture_of(plain)
    except (KeyError, ValueError):
        why = "known are the networks of RobustBench's classes DMWideResNet and DMPreActResNet"
        fix = "write a function that builds it and name it: package.module:function"
        raise ModelError(f"{short} is not a network that is known here by its weights", why=why, fix=fix) from None
    return from_robustbench(plain, network, **options)


def _architecture_of(plain: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Our name and options, from the names and shapes of the weights; `KeyError` or `ValueError` for others."""

    def blocks(pattern: str) -> int:
        return max(int(found[1]) for key in plain if (found := re.match(pattern, key))) + 1

    classes, wide = len(plain["logits.bias"]), "init_conv.weight" in plain
    channels = plain["init_conv.weight" if wide else "conv_2d.weight"].shape[1]
    options = {"num_classes": classes, "in_channels": channels, "activation": "silu"}  # SiLU in all of RobustBench's
    options |= _CIFAR100 if classes == 100 else {}  # not among the weights
    if wide:
        width = len(plain["layer.0.block.0.conv_0.weight"]) // 16
        return f"wrn-{6 * blocks(r'layer.0.block.([0-9]+)[.]') + 4}-{width}", options
    return f"preactresnet-{18 if blocks(r'layer_0.([0-9]+)[.]') == 2 else 34}", options


def to_robustbench(model: nn.Module) -> RobustBenchModel:
    """A network of `build_model` by RobustBench's names; `ModelError` where no class computes the same."""
    config: dict[str, Any] = getattr(model, "config", None) or {}
    name, weights = str(config.get("name", type(model).__name__)), dict(model.state_dict())
    found = re.fullmatch(r"(wrn|preactresnet)-(\d+)-?(\d*)", name)
    if not found or config["image_size"] != 32:
        raise ModelError(
            f"RobustBench has no class for {name} {config}", why="it knows WRN and PreActResNet of 32 pixels"
        )
    width = int(found[3] or 0)
    arguments = {
        "depth": int(found[2]),
        "width": width,
        "num_classes": config["num_classes"],
        "activation_fn": {"relu": "ReLU", "silu": "SiLU"}[config.get("activation", "silu")],
        "mean": config["mean"],
        "std": config["std"],
        "num_input_channels": config["in_channels"],
    }
    return RobustBenchModel("DMWideResNet" if width else "DMPreActResNet", arguments, weights)


def from_robustbench(weights: Mapping[str, Tensor], name: str, **options: Any) -> nn.Module:
    """Build the network ``name`` of `build_model`, with its options, from weights with RobustBench's keys.

    ``mean`` and ``std`` among the weights are taken as the normalisation; a leading ``module.`` or ``model.`` is
    dropped. `ModelError` names keys or shapes that do not fit.
    """
    plain = {_WRAPPED.sub("", key): value for key, value in weights.items()}
    for buffer in ("mean", "std"):
        if buffer in plain:
            options.setdefault(buffer, tuple(plain.pop(buffer).flatten().tolist()))
    model = build_model(name, options.pop("num_classes", 10), **options)
    load_weights(model, plain, "weights of RobustBench")
    return model.eval()


_PUBLISHED: dict[str, Callable[[str, str | Path | None], nn.Module]] = {
    "robustbench": _load_robustbench,
    "hf": _load_hub,
    "timm": partial(_load_pretrained, "timm"),
    "torchvision": partial(_load_pretrained, "torchvision.models"),
}
