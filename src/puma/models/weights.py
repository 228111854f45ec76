"""Weights on disk (safetensors with the model's configuration and a checksum; nothing is ever unpickled), and copies.

What a header claims (sizes, configuration, class names) is checked against the file before memory is allocated for it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from puma.errors import ModelError, PumaError
from puma.io import write_bytes
from puma.models.checks import require_module
from puma.models.networks import build_model, config_of

SCHEMA = "puma.model/1"
_BUILDER = "name what builds it: torchvision:NAME, timm:NAME or package.module:factory"
_MOST_META = 1 << 22  # characters of the JSON in a header
_Network = TypeVar("_Network", bound=nn.Module)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile."""
    require_module(model)
    while isinstance(model, _WRAPPERS) or "_orig_mod" in model._modules:
        model = model.get_submodule("module" if isinstance(model, _WRAPPERS) else "_orig_mod")
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict by the names that the network has without wrappers (``module.``, ``_orig_mod.``)."""
    return {_bare(name): value for name, value in unwrap(model).state_dict().items()}


def _bare(name: str) -> str:
    """A name without what torch.compile, FSDP and activation checkpointing put into its middle."""
    return re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", r"\1", name)


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the sorted state dict (names, types, shapes, bytes), whatever the device and memory format."""
    tensors = state_of(weights) if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path | str, schema: str, meta: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON value ``meta`` to one safetensors file, atomically, with a checksum over both.

    Tensors that share memory (tied weights) are written once for each name.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text, storages = json.dumps(meta, sort_keys=True, allow_nan=False), set[int]()
    header = {"schema": schema, "meta": text, "sha256": _checksum(plain, schema, text)}
    for name, tensor in plain.items():
        place = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if place in storages else tensor  # the library refuses memory that is shared
        storages.add(place)
    write_bytes(path, save(plain, metadata=header))  # not its save_file, which hides the errors of a full disk


def load_tensors(path: Path | str, schema: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, meta); `ModelError` where it is missing, foreign or damaged."""
    tensors, header = read_safetensors(path)
    meta = _meta(path, header, schema)
    if header.get("sha256") != _checksum(tensors, header["schema"], header.get("meta", "")):
        raise ModelError(f"{path} is damaged: its checksum does not fit its contents", fix="restore it from a copy")
    return tensors, meta


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of any safetensors file; `ModelError` where it is missing, a pickle, or not whole."""
    with _opened(Path(path)) as (file, header):
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (safe_open is no mapping)


_NO_MODEL = "`puma show PATH` says what a file or folder is; `puma train` makes runs and weights"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        named = f"a published model: puma.models.zoo.resolve_model('{path}')"
        fix = named if ":" in path.name else _NO_MODEL
        raise ModelError(f"cannot read weights {path}", why=error.strerror or str(error), fix=fix) from None
    # a safetensors file begins with the length of its header, which may be any bytes, and then "{"
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        fix = "convert it where you trust it: safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        why = "unpickling can run any code hidden in the file"
        raise ModelError(f"{path} is a pickled PyTorch file and is refused", why=why, fix=fix)
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened, opened.metadata() or {}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"{path} is not a whole safetensors file", why=str(error), fix=_NO_MODEL) from None


def _meta(path: Path | str, header: Mapping[str, str], schema: str) -> dict[str, Any]:
    """The JSON of a header, once it is known to be of ``schema``."""
    family, given = schema.partition("/")[0], header.get("schema", "")
    if given != schema:
        other = "of another version" if given.partition("/")[0] == family else f"not a {family} file"
        fix = "" if given else f"{_BUILDER} --weights {path}"
        raise ModelError(f"{path} is {other}", why=f"its schema is {given or 'not given'!r}, not {schema!r}", fix=fix)
    text, meta = header.get("meta", "{}"), None
    with suppress(ValueError, RecursionError):
        meta = json.loads(text) if len(text) <= _MOST_META else None
    if not isinstance(meta, dict):
        raise ModelError(f"{path} has a header that PUMA did not write", why="its meta entry is no small JSON table")
    return meta


def save_model(model: nn.Module, path: Path | str, *, class_names: Sequence[str] | None = None, **meta: Any) -> None:
    """Write a model's weights, configuration, class names and further JSON values ``meta`` to ``path`` (safetensors).

    Of a model without ``config`` (not of `build_model`) only the weights can be loaded again. ``class_names`` are one
    for each logit; by default those that the model was loaded with.
    """
    bare = unwrap(model)
    names = class_names if class_names is not None else getattr(bare, "class_names", None)
    described = {"config": config_of(bare), "class_names": list(names) if names else None}
    save_tensors(state_of(bare), path, SCHEMA, {**described, **meta})


def load_model(path: Path | str, like: nn.Module | None = None) -> nn.Module:
    """Build the model that `save_model` wrote, in eval mode, with ``model.class_names`` if the file has them.

    A run folder stands for its last model. ``like`` is a network of the same architecture, copied where PUMA did not
    build it. `ModelError`: damaged, a pickle, without a configuration, or weights of another architecture.
    """
    path = Path(path) / "last.safetensors" if Path(path).is_dir() else Path(path)
    if like is not None and not config_of(like):
        model = copy_network(like).cpu()
    else:
        with _opened(path) as (file, header):
            config = _meta(path, header, SCHEMA).get("config")
            if not config:
                fix = f"{_BUILDER} --weights {path}"
                raise ModelError(f"{path} holds the weights of a model that PUMA did not build", fix=fix)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            try:
                with torch.device("meta"):  # shapes only: what a forged configuration asks for costs no memory
                    planned = {name: tuple(value.shape) for name, value in build_model(**config).state_dict().items()}
            except (PumaError, TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ModelError(f"{path} has a configuration that builds no network", why=str(error)[:500]) from None
            _require_fit(planned, shapes, path, str(config["name"]))
        model = build_model(**config)
    tensors, meta = load_tensors(path, SCHEMA)
    load_weights(model, tensors, path)
    set_class_names(model, meta.get("class_names"))
    return model.eval()


def load_class_names(model: nn.Module, path: Path | str) -> None:
    """Give ``model`` the names of the classes in a file of `save_model`; files of other programs have none."""
    with _opened(Path(path)) as (_, header):
        if header.get("schema") == SCHEMA:
            set_class_names(model, _meta(path, header, SCHEMA).get("class_names"))


def load_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: Path | str = "weights", *, new_head: bool = False
) -> None:
    """Copy ``tensors`` (of ``origin``) into ``model``; prefixes of wrappers (``module.``, ``model.``) are ignored.

    With ``new_head`` those of the last layer stay as they are. `ModelError` where names or shapes differ.
    """
    own, unwrapped = state_of(model), unwrap(model)
    given = renamed(tensors, own.keys())
    if new_head:
        head = list(own)[-1].rpartition(".")[0] + "."
        given |= {name: value for name, value in own.items() if name.startswith(head)}
    shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (own, given)]
    _require_fit(shapes[0], shapes[1], origin, type(unwrapped).__name__)
    unwrapped.load_state_dict({name: given[_bare(name)] for name in unwrapped.state_dict()})


def renamed(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """``tensors`` without the prefixes that wrappers add, if that gives the wanted names."""
    plain = {_bare(name): value for name, value in tensors.items()}
    for prefix in 2 * ("module.", "model.", "network.", "net."):
        if not plain.keys() & wanted and all(name.startswith(prefix) for name in plain):
            plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def _require_fit(
    own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], origin: Path | str, network: str
) -> None:
    shared = sorted(own.keys() & given.keys())
    problems = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "shapes": [f"{name} {given[name]} for {own[name]}" for name in shared if own[name] != given[name]],
    }
    listed = {kind: ", ".join(names[:4] + ["..."] * (len(names) > 4)) for kind, names in problems.items() if names}
    if listed:
        why, fix = "; ".join(map(": ".join, listed.items())), "name the network they are of (to train: --new-head)"
        raise ModelError(f"{origin} does not fit {network}", why=why, fix=fix)


def _checksum(tensors: Mapping[str, Tensor], schema: str, text: str) -> str:
    return hashlib.sha256(f"{weights_sha256(tensors)} {schema} {text}".encode()).hexdigest()


def set_class_names(model: nn.Module, names: Sequence[str] | None) -> None:
    """Note the names of a model's classes in ``model.class_names``, one for each logit."""
    object.__setattr__(model, "class_names", tuple(map(str, names)) if names else None)


# --- copies and averages -------------------------------------------------------------------------------------------


def copy_network(model: _Network) -> _Network:
    """A deep copy, also of networks that keep computed weights (``torch.nn.utils.weight_norm``)."""
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed if not value.is_leaf})


def ramped_decay(decay: float, step: int | float) -> float:
    """``min(decay, (1 + step) / (10 + step))``: a short memory at first, so that the initial weights are forgotten."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """``model``: an averaged copy of a network, in eval mode."""

    def __init__(self, network: nn.Module) -> None:
        self.model = copy_network(network).eval().requires_grad_(False)
        self._parameters: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """``average <- decay * average + (1 - decay) * live`` for every weight; ``decay`` in [0, 1]."""
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # of torch
        average(self._parameters, [parameter.detach() for parameter in network.parameters()], None)

    @torch.no_grad()
    def copy_buffers(self, network: nn.Module) -> None:
        """Take over the buffers (running statistics) of the live network."""
        for own, live in zip(self.model.buffers(), network.buffers(), strict=True):
            own.copy_(live)
