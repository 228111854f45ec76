"""From real images to a file of synthetic ones: train, draw, write; the same call goes on after an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from puma.data.edmfile import write_edm
from puma.data.source import Source
from puma.errors import DataError, ResumeError, UsageError
from puma.generation.config import PRESETS, DiffusionConfig, SamplerConfig, differences
from puma.generation.diffusion import Diffusion
from puma.generation.drawing import Drawer, draw_parts
from puma.generation.networks import check_size
from puma.generation.output import FORMATS, read_comment, write_parquet
from puma.generation.sampling import DiffusionDrawer, check_sampler
from puma.generation.training import train_diffusion
from puma.io import lock, prepare_folder, write_json

SCHEMA = "puma.generated/1"


def generate(
    real: Source,
    count: int,
    *,
    out: Path | str,
    config: DiffusionConfig | None = None,
    sampler: SamplerConfig | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint_every: int = 500,
    progress: bool = False,
) -> Path:
    """Train a class-conditional diffusion model on ``real`` and draw ``count`` labelled images from it.

    Beside ``NAME.npz`` a folder ``NAME.diffusion`` keeps the model (``model.safetensors``, ``config.json``) and
    ``generated.json``, which says how the images were made. Interrupted at any moment, the same call goes on;
    finished, it returns at once; with a larger ``count`` the model is used again.

    Args:
        real: source of uint8 images with labels, every class present.
        count: how many images to draw, at least 1.
        out: target, ending in ``.npz`` or ``.parquet``.
        config: network and training; None takes the preset for the image size.
        sampler: how images are drawn; None for 18 deterministic Heun steps and balanced classes.
        seed: decides weights, batches and images.
        device: where to compute.
        checkpoint_every: training steps between checkpoints.
        progress: show bars.

    Returns:
        The path written. ``.npz``: EDM layout, ``image`` uint8 [N, H, W, C] and ``label`` int64 [N], the label being
        the condition the image was drawn for. ``.parquet``: the same in the Hugging Face layout.

    Raises:
        UsageError: a setting that cannot be used.
        DataError: real images that cannot be learnt from.
        ResumeError: ``out`` or its folder was made from other data or with other settings.
    """
    out = Path(out)
    config = config or preset_for(real.image_shape)
    sampler = sampler or SamplerConfig()
    _check_target(out, count)
    check_sampler(sampler, config.label_dropout)
    _check_real(real, config)
    made = {
        "schema": SCHEMA,
        "real": {"name": real.name, "fingerprint": real.fingerprint, "rows": len(real)},
        "diffusion": config.model_dump(mode="json"),
        "sampler": sampler.model_dump(mode="json", exclude={"part_rows"}),
        "seed": seed,
    }
    if finished(out, made, count):
        return out
    model = train_diffusion(
        real,
        out.with_suffix(".diffusion"),
        config=config,
        seed=seed,
        device=device,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    shares = np.bincount(real.labels, minlength=real.num_classes) / len(real) if sampler.labels == "real" else None
    return _draw_file(DiffusionDrawer(model, seed, sampler), count, out, made, sampler, shares, progress)


def generate_from(
    drawer: Diffusion | Drawer,
    count: int,
    *,
    out: Path | str,
    sampler: SamplerConfig | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Draw ``count`` labelled images from a model that is there already: ours, or anything that is a `Drawer`.

    Args:
        drawer: a trained `Diffusion` (`Diffusion.load`), or a drawer such as `puma.generation.pipelines`' with its
            own seed.
        count: how many images to draw, at least 1.
        out: target, ending in ``.npz`` or ``.parquet``.
        sampler: how images are drawn; of a drawer that is not ours only batch and part sizes.
        seed: of a `Diffusion`.
        progress: show a bar.

    Returns:
        The path written, as by `generate`.

    Raises:
        UsageError: a setting that cannot be used.
        ResumeError: ``out`` was made otherwise.
    """
    out, sampler = Path(out), sampler or SamplerConfig()
    _check_target(out, count)
    if sampler.labels == "real":
        raise UsageError('labels="real" needs the real images', fix="use generate(real, ...), or balanced labels")
    if isinstance(drawer, Diffusion):
        drawer = DiffusionDrawer(drawer, seed, sampler)
    made = {"schema": SCHEMA, "drawer": drawer.identity, "batch_size": sampler.batch_size}
    if finished(out, made, count):
        return out
    return _draw_file(drawer, count, out, made, sampler, None, progress)


def preset_for(image_shape: tuple[int, int, int]) -> DiffusionConfig:
    """The shipped configuration for images of this size (H, W, C).

    Raises:
        UsageError: images larger than any preset serves.
    """
    largest = max(image_shape[:2])
    if largest > 64:
        raise UsageError(
            f"no preset for images of {image_shape[0]}x{image_shape[1]} pixels",
            why="our diffusion models are for 8 to 64 pixels",
            fix="load the images with resize=32, or use a diffusers pipeline of your own",
        )
    return PRESETS["digits" if largest <= 16 else "small-32"]


def finished(out: Path, made: dict[str, Any], count: int) -> bool:
    """Whether ``out`` is there already, made exactly so and complete.

    Raises:
        ResumeError: it is there, but was made otherwise, or holds more.
    """
    if not out.exists():
        return False
    found = read_comment(out)
    if found.get("schema") != SCHEMA:
        raise ResumeError(f"{out} exists and is not ours", fix="give another output path, or move that file away")
    told = [line for name in made for line in differences(found.get(name), made[name], name)]
    if found["count"] > count:
        told.append(f"it holds {found['count']:,} images, more than the {count:,} asked for")
    if told:
        raise ResumeError(
            f"{out} exists and was made otherwise",
            why="; ".join(told),
            fix="give another output path, or move that file away",
        )
    return bool(found["count"] == count)


def _check_target(out: Path, count: int) -> None:
    if count < 1:
        raise UsageError(f"count is {count}, not at least 1")
    if out.suffix not in FORMATS:
        raise UsageError(f"cannot tell the format of {out}", fix=f"end its name in {' or '.join(FORMATS)}")


def _check_real(real: Source, config: DiffusionConfig) -> None:
    height, width, channels = real.image_shape
    check_size(config, (channels, height, width))
    counts = np.bincount(real.labels, minlength=real.num_classes)
    if len(counts) == 0 or counts.min() == 0:
        empty = np.flatnonzero(counts == 0).tolist()
        raise DataError(
            f"{real.name} has no images of class {', '.join(map(str, empty)) or '(any)'}",
            why="a class-conditional model cannot learn a class it never sees",
            fix="choose a subset that has every class, or renumber the labels",
        )


def _draw_file(
    drawer: Drawer,
    count: int,
    out: Path,
    made: dict[str, Any],
    sampler: SamplerConfig,
    shares: NDArray[np.float64] | None,
    progress: bool,
) -> Path:
    """Draw the parts that are missing, join them, and clear up."""
    folder = prepare_folder(out.with_suffix(".diffusion"))
    with lock(folder):
        for stale in (*out.parent.glob(f".{out.name}.*.tmp"), *folder.glob(".*.tmp")):  # of a killed process
            stale.unlink()
        parts = prepare_folder(folder / "parts")
        paths = draw_parts(
            drawer,
            count,
            parts,
            batch_size=sampler.batch_size,
            part_rows=sampler.part_rows,
            seed=int(made.get("seed", 0)),
            shares=shares,
            progress=progress,
        )
        told = made | {"count": count, "drawer": drawer.identity}
        images = (_member(path, "image") for path in paths)
        labels = np.concatenate([_member(path, "label") for path in paths])
        if out.suffix == ".npz":
            write_edm(out, images, labels, comment=told)
        else:
            write_parquet(out, images, labels, class_names=drawer.class_names, comment=told)
        write_json(folder / "generated.json", told)
        shutil.rmtree(parts)
    return out


def _member(path: Path, name: str) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        array: NDArray[Any] = arrays[name]
    return array
