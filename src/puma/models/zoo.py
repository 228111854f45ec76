"""Networks by spec: run folders, weights files, factories of a user's module, published models by name.

Files are read without running code (``torch.load(weights_only=True)``, safetensors), and nothing is downloaded unless a
package does it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from puma.errors import ModelError, PumaError, UsageError, first_line, unknown
from puma.io import REGISTRIES, offline_without_hub
from puma.models.networks import NAMED, Normalise, build_model, config_of
from puma.models.weights import load_class_names, load_model, load_weights, read_safetensors, renamed, state_of

_KINDS = ", ".join(f"{registry}:NAME" for registry in REGISTRIES)


def resolve_model(
    spec: str | Path, weights: str | Path | None = None, *, new_head: bool = False, **options: Any
) -> nn.Module:
    """Build the model that ``spec`` names.

    Args:
        spec: a weights file or run folder; ``"package.module:factory"`` (called without arguments); a name of
            `build_model`; or a published model, in eval mode, from [0, 1] pixels to logits. ``"robustbench:NAME"`` is
            the file ``NAME.pt`` in ``$PUMA_MODELS`` or ``models`` (``"robustbench:cifar10/Linf/NAME"``);
            ``"timm:NAME"`` and ``"torchvision:NAME"`` are pretrained models with their normalisation put inside;
            ``"hf:REPO"`` is what ``puma export hub`` wrote.
        weights: safetensors file, or the folder of a run, which stands for its last model; ``.pt`` of a published one.
        new_head: build the last layer anew, for ``num_classes``; the other weights are loaded.
        **options: for `build_model` and new last layers; the others do without.

    `ModelError`: no such module, factory, file or run, or several; the factory fails; the weights do not fit.
    """
    text = str(spec)
    weights = Path(weights) / "last.safetensors" if weights is not None and Path(weights).is_dir() else weights
    kind, _, name = text.partition(":")
    known: nn.Module | None = None
    if Path(text).exists() and not (options and NAMED.fullmatch(text)):  # a run's folder may be named after its network
        if weights is not None:
            raise ModelError(f"{text} has weights of its own", fix=f"name the network that {weights} is of")
        known = load_model(text)
    elif kind in ("hf", "robustbench"):
        known = _load_hub(name, weights) if kind == "hf" else _load_robustbench(name, weights)
    if known is not None:
        return _with_new_head(known, **options) if new_head else known
    if kind in ("timm", "torchvision"):
        return _load_pretrained(kind, name, weights, new_head=new_head, **options)
    if name and new_head and weights is None:
        raise UsageError(f"without weights {text} keeps the last layer it has", fix="build it anew in the factory")
    if name:
        model = _call_factory(text)
    elif Path(text).suffix == ".safetensors" or "/" in text:
        raise ModelError(f"weights {text} do not exist")
    elif "num_classes" not in options:
        why = "a model is a weights file, the folder of a finished run, or package.module:factory"
        fix = f"train one with `puma train`; published ones are {_KINDS}"
        raise ModelError(f"there is no model at {text}", why=why, fix=fix)
    else:
        try:
            model = build_model(text, **options)
        except UsageError as error:
            error.fix += f"; published ones are {_KINDS}" if error.what.startswith("unknown model") else ""
            raise
    if weights is not None:
        load_weights(model, read_safetensors(weights)[0], weights, new_head=new_head)
        if not new_head:
            load_class_names(model, weights)
        model.eval()
    return model


def _call_factory(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own file beside the command; never in place of an installed module
    factory: Any = None
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        model = factory()
    except Exception as error:  # whatever a user's code raises
        if factory is None and isinstance(error, (ImportError, AttributeError)):
            near = difflib.get_close_matches(module_name, REGISTRIES, n=1)
            fix = f"did you mean {near[0]}:{factory_name}?" if near else '"package.module:factory"'
            raise ModelError(f"cannot find the factory {spec!r}", why=str(error), fix=fix) from error
        raise ModelError(f"the factory {spec!r} failed", why=f"{type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _with_new_head(model: nn.Module, num_classes: int, *, seed: int = 0, **_: Any) -> nn.Module:
    """A network of `build_model` with its weights, but a last layer for so many classes."""
    built = build_model(**{**(config_of(model) or {}), "num_classes": num_classes}, seed=seed)
    load_weights(built, state_of(model), new_head=True)
    return built.eval()


def _load_pretrained(
    package: str, name: str, weights: str | Path | None, *, new_head: bool, seed: int = 0, **options: Any
) -> nn.Module:
    timm = package == "timm"
    module = _package("timm" if timm else "torchvision.models")
    known: list[str] = module.list_models() if timm else module.list_models(module=module)
    if not (module.is_model(name) or ":" in name if timm else name.lower() in known):  # timm:hf-hub:OWNER/NAME
        raise ModelError(f"{package} has no model {name!r}", fix=unknown("model", name, known).fix)

    def build(*, pretrained: bool = False, **classes: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if timm:
                return cast(nn.Module, module.create_model(name, pretrained=pretrained, **classes))
            network: nn.Module = module.get_model(name, weights="DEFAULT" if pretrained else None, **classes)
        # GoogLeNet, Inception: no heads for a loss that is not ours; images normalised as with pretrained weights
        parts = {"aux1": None, "aux2": None, "AuxLogits": None, "aux_logits": None, "transform_input": True}
        for part in [part for part in parts if hasattr(network, part)]:
            setattr(network, part, parts[part])
        return network

    tensors = None if weights is None else _read_weights(Path(weights))
    try:
        if timm and tensors is None:
            offline_without_hub()
        model = build(pretrained=tensors is None)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        code = f"timm.create_model('{name}', pretrained=True)"
        code = code if timm else f"torchvision.models.get_model('{name}', weights='DEFAULT')"
        what = f"{package}:{name} cannot be built with its weights"
        fix = f'give them as --weights FILE; or where there is a network: python -c "import {package}; {code}"'
        raise ModelError(what, why=first_line(error), fix=fix) from None
    other_classes = False
    if tensors is not None or new_head:
        own = state_of(model)
        given = own if tensors is None else renamed(tensors, own)
        given = {key: value for key, value in given.items() if not re.match(r"(aux[12]|AuxLogits)\.", key)}
        head = next(key for key in reversed(own) if own[key].ndim)
        given_classes = given.get(head, own[head]).numel() // own[head][0].numel()
        wanted = int(options["num_classes"]) if new_head else given_classes
        if other_classes := new_head or wanted != len(own[head]):
            model = build(num_classes=wanted)
        load_weights(model, given, weights or package, new_head=new_head)
    if getattr(model, "num_classes", None) == 0:
        raise ModelError(f"{package}:{name} is made for features: it has no classes", fix="train it with --new-head")
    if timm:
        config: Any = model.pretrained_cfg
        mean, std, size = config["mean"], config["std"], config["input_size"]
    else:
        preset = module.get_model_weights(name).DEFAULT.transforms()
        mean, std, size = preset.mean, preset.std, preset.crop_size
    network = nn.Sequential(OrderedDict(normalise=Normalise(mean, std), model=model)).eval()
    if not other_classes:  # those of others may be made for images of any size
        object.__setattr__(network, "image_size", size[-1])
    if weights is not None and Path(weights).suffix == ".safetensors" and not new_head:
        load_class_names(network, weights)
    return network


def _load_hub(name: str, weights: str | Path | None) -> nn.Module:
    hub = _package("huggingface_hub", '"puma-robust[hub]"')
    offline_without_hub()
    try:
        return load_model(hub.hf_hub_download(name, "model.safetensors") if weights is None else weights)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors and ValueErrors
        fix = f"check the name; where there is a network: hf download {name}"
        if isinstance(error, PumaError):
            fix = f"hf: is for what `puma export hub` wrote; of timm it is timm:hf-hub:{name}; others: module:function"
        raise ModelError(f"cannot load hf:{name}", why=first_line(error), fix=fix) from None


def _package(name: str, requirement: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: torchvision that was built for another torch
        top = name.partition(".")[0]
        what, fix = f"{top} is not installed", f"pip install {requirement or top}"
        if not isinstance(error, ImportError):
            what, fix = f"{top} cannot be imported", "pip install --upgrade torch torchvision"
        raise UsageError(what, why=first_line(error), fix=fix) from None


# what training scripts keep beside the weights: their arguments and numbers of numpy
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]
_PLAIN += [(np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pt`` file; of the latter nothing but tensors and plain values is read."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise ModelError(f"cannot read {path}", why=first_line(error), fix="download it again") from None
        why = f"it holds {found[1]}: reading that can run any code hidden in the file"
        pick = "x.state_dict() if hasattr(x, 'state_dict') else x['state_dict']"
        code = f"import torch; x = torch.load('{path}', weights_only=False); torch.save({pick}, 'weights.pt')"
        raise ModelError(f"cannot read {path}", why=why, fix=f'where you trust it: python -c "{code}"') from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        fix = "download it again" if path.is_file() else "check the path"
        raise ModelError(f"cannot read {path}", why=first_line(error), fix=fix) from None
    for key, value in content.items() if isinstance(content, dict) else ():
        if "ema" in str(key).lower() and isinstance(value, dict):
            logging.getLogger("puma").warning("%s holds averaged weights too (%s): they are not read", path, key)
    for key in ("state_dict", "model_state_dict", "model", "net"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        why = "a dictionary of tensors is needed, or one under 'state_dict'"
        raise ModelError(f"{path} holds no weights", why=why, fix="torch.save(model.state_dict(), 'weights.pt')")
    return content


# --- RobustBench ---------------------------------------------------------------------------------------------------

_WRAPPED = re.compile(r"^(module\.)?(model\.)?")
# 1.1.1 of PyPI lacks the models since 2023 and cannot be imported; either version imports pkg_resources
_ROBUSTBENCH = "pip install 'setuptools<81' git+https://github.com/RobustBench/robustbench.git"
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
    dataset, threat = ["cifar10", "Linf", *name.split("/")[:-1]][-2:]
    theirs = f"load_model('{short}', '{root}', '{dataset}', '{threat}')"
    if not files:
        near = difflib.get_close_matches(short, [path.stem for path in root.glob("**/*.pt")], n=1)
        why = "published weights are not downloaded by PUMA; RobustBench's package does it"
        fix = f'{_ROBUSTBENCH} && python -c "from robustbench.utils import load_model; {theirs}"'
        fix = f"did you mean robustbench:{near[0]}?" if near else fix
        raise ModelError(f"there is no {short}.pt in {root}", why=why, fix=fix)
    saved = _read_weights(files[0])
    plain = {_WRAPPED.sub("", key): value for key, value in saved.items()}
    try:
        options = dict(getattr(saved, "_metadata", {}).get("puma") or _architecture_of(plain))
        network = str(options.pop("name"))
        with torch.device("meta"):  # other classes have the same keys and more
            own = build_model(network, **options).state_dict().keys()
        if own != plain.keys() - {"mean", "std"}:
            raise ValueError
    except (KeyError, ValueError):
        why = "known are the networks of RobustBench's classes DMWideResNet and DMPreActResNet"
        code = f"from robustbench.utils import load_model; net = lambda: {theirs}"
        fix = f'{_ROBUSTBENCH} && echo "{code}" > own.py, and own:net is the model'
        raise ModelError(f"{short} is not a network that is known here by its weights", why=why, fix=fix) from None
    return from_robustbench(plain, network, **options)


def _architecture_of(plain: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `build_model` from the names and shapes of the weights; `KeyError` or `ValueError` for others."""

    def blocks(pattern: str) -> int:
        return max(int(found[1]) for key in plain if (found := re.match(pattern, key))) + 1

    classes, wide = len(plain["logits.bias"]), "init_conv.weight" in plain
    channels = plain["init_conv.weight" if wide else "conv_2d.weight"].shape[1]
    options = {"num_classes": classes, "in_channels": channels, "activation": "silu"}  # so in all of RobustBench's
    options |= _CIFAR100 if classes == 100 else {}  # not among the weights
    if wide:
        width = len(plain["layer.0.block.0.conv_0.weight"]) // 16
        return {**options, "name": f"wrn-{6 * blocks(r'layer.0.block.([0-9]+)[.]') + 4}-{width}"}
    return {**options, "name": f"preactresnet-{18 if blocks(r'layer_0.([0-9]+)[.]') == 2 else 34}"}


def to_robustbench(model: nn.Module) -> RobustBenchModel:
    """A network of `build_model` by RobustBench's names; `ModelError` where no class computes the same."""
    config = config_of(model) or {}
    name, weights = str(config.get("name", type(model).__name__)), dict(model.state_dict())
    found = re.fullmatch(r"(wrn|preactresnet)-(\d+)-?(\d*)", name)
    if not found or config["image_size"] != 32:
        why = "it has WRN and PreActResNet of 32 pixels"
        raise ModelError(f"RobustBench has no class for {name} {config}", why=why)
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
