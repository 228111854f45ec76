"""What survives of a training: states to go on from. Tensors only, written whole, checked by a checksum when read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from puma.errors import ModelError
from puma.models.weights import load_tensors, save_tensors

SCHEMA = "puma.state/1"
_KEPT = 2

log = logging.getLogger("puma")


def save_state(folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write the state after ``step`` steps to ``folder`` and remove all but the two newest.

    Raises:
        StorageError: the disk is full; the states before are intact.
    """
    path = folder / f"state-{step:09d}.safetensors"
    save_tensors(tensors, path, SCHEMA, {"step": step, **meta})
    for old in _states(folder)[:-_KEPT]:
        with suppress(OSError):
            old.unlink()
    return path


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the newest state that is whole: (tensors, meta), or None where there is none.

    A damaged state is passed over, and said so in the log.

    Raises:
        ModelError: there are states, and all of them are damaged.
    """
    problems = []
    for path in reversed(_states(folder)):
        try:
            found = load_tensors(path, SCHEMA)
        except ModelError as error:
            problems.append(error.what)
            log.warning("%s; going back to the state before it", error.what)
            continue
        if problems:
            log.warning("going on from %s", path)
        return found
    if problems:
        raise ModelError("no state of this run is whole", why="; ".join(problems), fix="train again in another folder")
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*.safetensors"))
