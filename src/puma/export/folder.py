"""What both kinds of export share: a folder that appears whole, the self-contained model.py, facts of the run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from puma.errors import StorageError
from puma.io import prepare_folder, read_json, storage_errors, write_json, write_text
from puma.models.weights import weights_sha256


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out`` when the body succeeds; nothing is left where it fails.

    Raises:
        StorageError: ``out`` holds something already, or cannot be written.
    """
    if out.is_dir() and any(out.iterdir()):
        raise StorageError(
            f"{out} is not empty", why="an export never mixes with other files", fix="choose another --out"
        )
    prepare_folder(out.parent)
    building = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(out):
            building.mkdir()
            yield building
            if out.is_dir():
                out.rmdir()
            building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_network(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``model.py`` and ``config.json``; return the latter with PUMA's own facts under ``puma``."""
    source = Path(__file__).with_name("standalone.py").read_text()
    write_text(folder / "model.py", source)
    own = dict(getattr(model, "config", None) or {})
    facts = {key: own[key] for key in ("name", "in_channels", "image_size")}
    whole = {**config, "puma": {**facts, "weights_sha256": weights_sha256(model)}}
    write_json(folder / "config.json", whole)
    return whole


def run_facts(run: Path | None) -> dict[str, Any]:
    """Facts of a run folder worth telling: threat model, recipe, strategy, steps; empty without one."""
    if run is None or not (run / "run.json").is_file():
        return {}
    settings = read_json(run / "run.json").get("settings", {})
    wanted = ("threat", "recipe.objective", "recipe.steps", "recipe.batch_size", "recipe.trades_weight", "seed")
    return {key.removeprefix("recipe."): settings[key] for key in wanted if settings.get(key) is not None}
