"""Networks by spec: run folders, weights files, factories of a user's module, published models by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from puma.errors import ModelError
from puma.models.networks import build_model
from puma.models.published import PUBLISHED, load_published
from puma.models.weights import load_model, load_weights, read_safetensors


def resolve_model(
    spec: str | Path, weights: str | Path | None = None, *, new_head: bool = False, **options: Any
) -> nn.Module:
    """Build the model that ``spec`` names.

    Args:
        spec: a weights file or run folder; ``"package.module:factory"`` (called without arguments); a published model
            (``"robustbench:NAME"``, ``"timm:NAME"``, ``"torchvision:NAME"``, ``"hf:REPO"``); a name of `build_model`.
        weights: for a factory or a name: safetensors file, or the folder of a run, which stands for its last model.
        new_head: leave the last layer as built where the weights are for other classes.
        **options: for `build_model`; factories do without.

    Raises:
        ModelError: no such module, factory, file or run; the factory fails; the weights do not fit.
        UsageError: unknown name.
    """
    text = str(spec)
    if Path(text).exists() and weights is None:
        return load_model(text)
    if text.partition(":")[0] in PUBLISHED:
        return load_published(text, weights)
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
        load_weights(model, read_safetensors(file)[0], file, new_head=new_head)
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
