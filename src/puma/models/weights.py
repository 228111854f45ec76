"""Weights on disk: safetensors with the model's configuration and a checksum inside; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from puma.errors import ModelError
from puma.io import atomic_path
from puma.models.networks import build_model

SCHEMA = "puma.model/1"


def weights_sha256(weights: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over the sorted state dict: names, types, shapes and bytes.

    Independent of device and memory format: the same weights give the same digest.
    """
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path | str, schema: str, meta: Mapping[str, Any]) -> None:
    """Write named tensors and a JSON value ``meta`` to one safetensors file, atomically, with a checksum over both.

    Raises:
        StorageError: the disk is full or the path cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(meta, sort_keys=True, allow_nan=False)
    header = {"schema": schema, "meta": text, "sha256": _checksum(plain, schema, text)}
    write_safetensors(plain, path, header)


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path | str, header: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        StorageError: the disk is full or the path cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(header))
        except SafetensorError as error:
            # the library writes by itself and tells the system's error in words only: "... (os error 28)"
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            raise


def load_tensors(path: Path | str, schema: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, meta).

    Raises:
        ModelError: the file is missing, a pickle, truncated, of another schema, or its checksum does not fit.
    """
    path = Path(path)
    tensors, header = read_safetensors(path)
    family = schema.partition("/")[0]
    if header.get("schema", "").partition("/")[0] != family:
        raise ModelError(f"{path} is not a {family} file", why=f"its schema is {header.get('schema', 'not given')!r}")
    text = header.get("meta", "")
    if header.get("sha256") != _checksum(tensors, header["schema"], text):
        raise ModelError(f"{path} is damaged: its checksum does not fit its contents", fix="restore it from a copy")
    meta: dict[str, Any] = json.loads(text)
    return tensors, meta


def read_safetensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of any safetensors file.

    Raises:
        ModelError: it is missing, a pickle (which is refused, never executed), or not a whole safetensors file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelError(f"cannot read weights {path}", why=error.strerror or str(error)) from None
    # a safetensors file opens with the length of its header, which may be any bytes, and then "{"
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise ModelError(
            f"{path} is a pickled PyTorch file and is refused",
            why="unpickling can run any code hidden in the file",
            fix="convert it where you trust it: safetensors.torch.save_file(state_dict, 'weights.safetensors')",
        )
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, header  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a whole safetensors file", why=str(error)) from None


def save_model(model: nn.Module, path: Path | str, **meta: Any) -> None:
    """Write a model's weights and configuration to ``path`` (safetensors).

    Args:
        model: of `build_model`, or any module; without ``config`` only the weights can be loaded again.
        path: file to write.
        **meta: further JSON values kept beside the configuration.
    """
    config = getattr(model, "config", None)
    save_tensors(model.state_dict(), path, SCHEMA, {"config": config, **meta})


def load_model(path: Path | str) -> nn.Module:
    """Build the model that `save_model` wrote, in eval mode; a run folder stands for its last model.

    Raises:
        ModelError: the file is damaged, a pickle, without a configuration, or its weights fit another architecture.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last.safetensors"
    tensors, meta = load_tensors(path, SCHEMA)
    config = meta.get("config")
    if not config:
        raise ModelError(
            f"{path} holds the weights of a model that PUMA did not build",
            fix=f"name what builds it: package.module:factory --weights {path} instead of the file",
        )
    model = build_model(**config)
    load_weights(model, tensors, path)
    return model.eval()


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], origin: Path | str = "weights") -> None:
    """Copy ``tensors`` into ``model``.

    Raises:
        ModelError: names or shapes differ; the message names them.
    """
    own = model.state_dict()
    problems = []
    if missing := sorted(own.keys() - tensors.keys()):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(tensors.keys() - own.keys()):
        problems.append(f"unexpected: {_some(unexpected)}")
    shared = sorted(own.keys() & tensors.keys())
    if shapes := [n for n in shared if own[n].shape != tensors[n].shape]:
        problems.append("shapes: " + _some(f"{n} {tuple(tensors[n].shape)} for {tuple(own[n].shape)}" for n in shapes))
    if problems:
        raise ModelError(f"{origin} does not fit {type(model).__name__}", why="; ".join(problems))
    model.load_state_dict(dict(tensors))


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _checksum(tensors: Mapping[str, torch.Tensor], schema: str, text: str) -> str:
    return hashlib.sha256(f"{weights_sha256(tensors)} {schema} {text}".encode()).hexdigest()
