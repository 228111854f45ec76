"""From real images to a file of synthetic ones: train, sample, write; the same call goes on after an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from puma.errors import DataError, ResumeError, UsageError
from puma.files import lock, prepare_folder, write_json
from puma.generation.config import PRESETS, DiffusionConfig, SamplerConfig, differences
from puma.generation.networks import check_size
from puma.generation.output import read_comment, write_npz
from puma.generation.sampling import sample_parts
from puma.generation.training import train_diffusion

if TYPE_CHECKING:
    from puma.data.source import Source

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
    progress: bool = False,
) -> Path:
    """Train a class-conditional diffusion model on ``real`` and draw ``count`` labelled images from it.

    Beside ``NAME.npz`` a folder ``NAME.diffusion`` keeps the model (``model.safetensors``, ``config.json``) and
    ``generated.json``, which says how the images were made. Interrupted at any moment, the same call goes on;
    finished, it returns at once.

    Args:
        real: source of uint8 images with labels, every class present.
        count: how many images to draw, at least 1.
        out: target, ending in ``.npz``.
        config: network and training; None takes the preset for the image size.
        sampler: how images are drawn; None for 18 deterministic Heun steps and balanced classes.
        seed: decides weights, batches and images.
        device: where to compute.
        progress: show bars.

    Returns:
        The path written: EDM layout, ``image`` uint8 [N, H, W, C] and ``label`` int64 [N], the label being the
        condition the image was drawn for.

    Raises:
        UsageError: a setting that cannot be used.
        DataError: real images that cannot be learnt from.
        ResumeError: ``out`` or its folder was made from other data or with other settings.
    """
    out = Path(out)
    config = config or preset_for(real.image_shape)
    sampler = sampler or SamplerConfig()
    _check(real, count, out, config, sampler)
    folder = prepare_folder(out.with_suffix(".diffusion"))
    made = {
        "schema": SCHEMA,
        "real": {"name": real.name, "fingerprint": real.fingerprint, "rows": len(real)},
        "diffusion": config.model_dump(mode="json"),
        "sampler": sampler.model_dump(mode="json", exclude={"part_rows"}),
        "seed": seed,
    }
    if _finished(out, made, count):
        return out
    model = train_diffusion(real, folder, config=config, seed=seed, device=device, progress=progress)
    shares = _shares(real) if sampler.labels == "real" else None
    with lock(folder):
        parts = prepare_folder(folder / "parts")
        paths = sample_parts(model, count, parts, seed=seed, sampler=sampler, shares=shares, progress=progress)
        labels = np.concatenate([_member(path, "label") for path in paths])
        told = made | {"count": count, "weights": model.weights_sha256()}
        write_npz(out, (_member(path, "image") for path in paths), labels, comment=told)
        write_json(folder / "generated.json", told | {"made_from": model.made_from})
        shutil.rmtree(parts)
    return out


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


def _check(real: Source, count: int, out: Path, config: DiffusionConfig, sampler: SamplerConfig) -> None:
    if count < 1:
        raise UsageError(f"count is {count}, not at least 1")
    if out.suffix != ".npz":
        raise UsageError(
            f"cannot tell the format of {out}", fix=f"give a name ending in .npz: {out.with_suffix('.npz')}"
        )
    if sampler.sigma_min >= sampler.sigma_max:
        raise UsageError(f"sigma_min {sampler.sigma_min} is not below sigma_max {sampler.sigma_max}")
    if sampler.guidance != 1 and config.label_dropout == 0:
        raise UsageError(
            f"guidance {sampler.guidance} needs a model that also learnt images without labels",
            why="label_dropout is 0",
            fix="set label_dropout to 0.1",
        )
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


def _finished(out: Path, made: dict[str, Any], count: int) -> bool:
    """Whether ``out`` is there already, made exactly so."""
    if not out.exists():
        return False
    found = read_comment(out)
    told = [line for name in made for line in differences(found.get(name), made[name], name)]
    if told:
        raise ResumeError(
            f"{out} exists and was made otherwise",
            why="; ".join(told),
            fix="give another output path, or move that file away",
        )
    if found["count"] > count:
        raise ResumeError(
            f"{out} holds {found['count']:,} images, more than the {count:,} asked for",
            fix="give another output path, or move that file away",
        )
    return bool(found["count"] == count)


def _shares(real: Source) -> NDArray[np.float64]:
    return np.bincount(real.labels, minlength=real.num_classes) / len(real)


def _member(path: Path, name: str) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        array: NDArray[Any] = arrays[name]
    return array
