"""Draw images from a diffusion model in parts, each written whole, so that an interruption costs one part at most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from puma.files import fingerprint
from puma.generation.config import SamplerConfig
from puma.generation.diffusion import Diffusion
from puma.generation.edm import Churn, guided, sample, schedule
from puma.generation.noise import Stream, counter_generator, image_noise
from puma.generation.output import read_part, write_npz
from puma.progress import Progress


def condition_labels(
    indices: NDArray[np.int64], num_classes: int, *, seed: int = 0, shares: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """Labels that generated images ``indices`` are drawn for; int64, of the shape of ``indices``.

    Balanced and interleaved (0, 1, 2, ..., 0, 1, ...) without ``shares``; else random with those class shares. Image
    k's label does not depend on how many images are asked for.

    >>> condition_labels(np.arange(5), 3)
    array([0, 1, 2, 0, 1])
    """
    if shares is None:
        return indices % num_classes
    uniform = np.array([counter_generator(seed, Stream.LABEL, int(index)).random() for index in indices])
    return np.searchsorted(np.cumsum(shares / shares.sum())[:-1], uniform, side="right").astype(np.int64)


@torch.inference_mode()
def sample_images(
    model: Diffusion,
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    *,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
) -> NDArray[np.float64]:
    """Generated images ``indices`` of ``seed`` under ``labels``, in [-1, 1] but not clipped; float64 [B, H, W, C].

    Image k has its own noise: another batch size or order gives the same image up to the network's float32 rounding
    (below 1e-3 here, far below half a grey level of 1/127.5).
    """
    sampler = sampler or SamplerConfig()
    height, width, channels = model.image_shape
    device = next(model.denoiser.parameters()).device
    shape = (channels, height, width)
    images = sample(
        guided(model.denoiser, torch.from_numpy(labels).to(device), model.num_classes, sampler.guidance),
        image_noise(seed, indices, 0, shape).to(device),
        schedule(sampler.steps, sampler.sigma_min, sampler.sigma_max, sampler.rho),
        churn=Churn(sampler.churn, sampler.churn_low, sampler.churn_high, sampler.churn_scale),
        fresh_noise=lambda step: image_noise(seed, indices, step + 1, shape).to(device),
    )
    return images.permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: NDArray[np.float64]) -> NDArray[np.uint8]:
    """From [-1, 1] to the nearest of 0..255, clipped.

    >>> to_pixels(np.array([-1.2, -1.0, 0.0, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def sample_parts(
    model: Diffusion,
    count: int,
    folder: Path,
    *,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
    shares: NDArray[np.float64] | None = None,
    progress: bool = False,
) -> list[Path]:
    """Write images 0 .. count - 1 as part files; parts that are there already are kept.

    Batches never cross a part, so a part's bytes depend on the settings only. A part of other settings, or a broken
    one, is made again.

    Returns:
        The part files in order.
    """
    sampler = sampler or SamplerConfig()
    settings = fingerprint(
        {
            "model": model.identity,
            "seed": seed,
            "sampler": sampler.model_dump(mode="json"),
            "shares": None if shares is None else shares.tolist(),
        }
    )
    spans = [(start, min(start + sampler.part_rows, count)) for start in range(0, count, sampler.part_rows)]
    paths = [folder / f"part-{start // sampler.part_rows:06d}.npz" for start, _ in spans]
    done = [
        read_part(path, settings, stop - start) is not None for path, (start, stop) in zip(paths, spans, strict=True)
    ]
    ready = sum(stop - start for (start, stop), there in zip(spans, done, strict=True) if there)
    with Progress("sampling", count, "images", show=progress, done=ready) as bar:
        for path, (start, stop), there in zip(paths, spans, done, strict=True):
            if there:
                continue
            images, labels = [], []
            for indices in _batches(start, stop, sampler.batch_size):
                label = condition_labels(indices, model.num_classes, seed=seed, shares=shares)
                images.append(to_pixels(sample_images(model, indices, label, seed=seed, sampler=sampler)))
                labels.append(label)
                bar.advance(len(indices))
            write_npz(path, [np.concatenate(images)], np.concatenate(labels), comment={"settings": settings})
    return paths


def _batches(start: int, stop: int, size: int) -> Iterator[NDArray[np.int64]]:
    for first in range(start, stop, size):
        yield np.arange(first, min(first + size, stop), dtype=np.int64)
