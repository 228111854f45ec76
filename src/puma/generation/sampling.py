"""Sample labelled images from a diffusion model or a diffusers pipeline into one .npz; the same call resumes.

Image k depends on the sampler's settings and on k only, never on how many are sampled or in what batches.
"""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from puma.data.checks import check_classes
from puma.data.images import resized
from puma.data.npz import read_comment, write_npz
from puma.data.source import Source
from puma.devices import warn_slow_bf16
from puma.errors import CheckError, DataError, ModelError, ResumeError, UsageError, first_line
from puma.generation.diffusion import Diffusion, Training, build_denoiser, train_diffusion
from puma.generation.edm import guided, sample, schedule
from puma.generation.networks import DiffusionConfig, diffusion_config, import_diffusers
from puma.io import Shards, fingerprint, lock, require_same_settings, sha256_file, spans, write_json, write_text
from puma.models.weights import weights_sha256
from puma.progress import Progress
from puma.rng import Stream, image_noise, torch_seed

SCHEMA = "puma.generated/3"
_AWAY = "give another output path, or move that file away"
Labels = NDArray[np.int64]
Pixels = NDArray[np.uint8]


class SamplerConfig(BaseModel):
    """Settings of the sampler: noise levels of Karras et al. 2022, guidance, images per batch and shard."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(default=18, ge=1)
    sigma_min: float = Field(default=0.002, gt=0, lt=1)
    sigma_max: float = Field(default=80.0, ge=1)
    rho: float = Field(default=7.0, gt=0)
    guidance: float = Field(default=1.0, ge=0)
    batch_size: int = Field(default=512, ge=1)
    shard_rows: int = Field(default=2048, ge=1)


@dataclass(frozen=True, repr=False)
class Sampler:
    """A function from image numbers and labels to pixels, and what decides them."""

    sample: Callable[[Labels, Labels], Pixels]  # from int64 [B] each; image k must not depend on its batch
    identity: dict[str, Any]  # JSON of everything that decides the pixels: weights, seed, settings
    image_shape: tuple[int, int, int]  # (H, W, C)
    class_names: tuple[str, ...]


def diffusion_sampler(model: Diffusion, seed: int = 0, config: SamplerConfig | None = None) -> Sampler:
    """Our diffusion model as a sampler: image k of a seed has its own noise.

    In another batch it differs by the network's rounding: in float32 within 1e-3 in [-1, 1], less than a grey level.
    """
    settings, device = config or SamplerConfig(), next(model.denoiser.parameters()).device
    _check_sampler(settings, model.config.label_dropout)
    warn_slow_bf16(model.config.precision, device)
    height, width, channels = model.image_shape
    sigmas = schedule(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho)

    @torch.inference_mode()
    def pixels(indices: Labels, labels: Labels) -> Pixels:
        noise = torch.from_numpy(image_noise(seed, indices, 0, (channels, height, width))).to(device)
        conditions = torch.from_numpy(labels).to(device)
        images = sample(guided(model.denoiser, conditions, len(model.class_names), settings.guidance), noise, sigmas)
        return to_pixels(images.permute(0, 2, 3, 1).cpu().numpy())

    chosen = settings.model_dump(mode="json", exclude={"batch_size", "shard_rows"})
    identity = {"weights": weights_sha256(model.denoiser), "seed": seed, "sampler": chosen}
    return Sampler(pixels, identity, model.image_shape, model.class_names)


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
    """Train a class-conditional diffusion model on ``real`` and sample ``count`` labelled images from it.

    Interrupted at any moment, the same call resumes; a larger ``count`` uses the model again, which ``NAME.diffusion``
    beside ``out`` keeps (`train_diffusion`); the rest as `generate_from`. ``config`` None: the settings for the
    image size; ``seed`` decides weights, batches and images. `UsageError` for a setting that cannot be used,
    `DataError` for real images that cannot be trained on, `ResumeError` for a folder of other data or settings.
    """
    config, sampler = config or diffusion_config(real.image_shape), sampler or SamplerConfig()
    out = _checked_target(out, count)
    _check_sampler(sampler, config.label_dropout)
    _check_trainable(real, config)
    options: dict[str, Any] = {"device": device, "checkpoint_every": checkpoint_every, "progress": progress}
    model = train_diffusion(real, out.with_suffix(".diffusion"), config=config, seed=seed, **options)
    return generate_from(model, count, out=out, config=sampler, seed=seed, progress=progress)


def generate_from(
    sampler: Diffusion | Sampler,
    count: int,
    *,
    out: Path | str,
    config: SamplerConfig | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Path:
    """Sample ``count`` labelled images from a trained `Diffusion`, or any `Sampler` with a seed of its own. Resumes.

    Writes and returns ``out``, a ``NAME.npz`` in the EDM layout: ``image`` uint8 [N, H, W, C] and ``label`` int64 [N],
    the condition: k modulo the number of classes. Beside it lie ``NAME.npz.sha256`` and
    ``NAME.diffusion/generated.json``, which says how the images were made. ``config`` are the sampler's settings (of
    one that is not ours only batch and shard sizes); None for 18 deterministic Heun steps. `ResumeError` if ``out``
    was made otherwise, `DataError` if it is damaged.
    """
    config, out = config or SamplerConfig(), _checked_target(out, count)
    made_from = {}
    if isinstance(sampler, Diffusion):
        made_from = {"config": sampler.config.model_dump(mode="json"), **sampler.made_from}
        sampler = diffusion_sampler(sampler, seed, config)
    settings = {"generator": sampler.identity, "batch_size": config.batch_size, "labels": "balanced"}
    folder, checksum = out.with_suffix(".diffusion"), out.with_name(f"{out.name}.sha256")
    with lock(folder):
        if not _complete(out, checksum, settings, count):
            shards = Shards(folder / "shards", settings, suffix=".npz", schema=SCHEMA)
            paths = _sample_shards(sampler, count, shards, config, progress)
            checksum.unlink(missing_ok=True)  # of a smaller file that this one replaces
            images = (np.load(path, allow_pickle=False)["image"] for path in paths)
            names = sampler.class_names  # left out where they only count: then any reader of the layout can read it
            names = () if names == tuple(map(str, range(len(names)))) else names
            labels, comment = _labels(range(count), sampler), {"schema": SCHEMA, **settings, "count": count}
            write_npz(out, images, labels, class_names=names, comment={**comment, "model": made_from})
        if not checksum.exists():
            write_text(checksum, f"{sha256_file(out)}  {out.name}\n")  # the format of sha256sum
        if (folder / "shards").exists() or not (folder / "generated.json").exists():
            write_json(folder / "generated.json", read_comment(out))
            shutil.rmtree(folder / "shards", ignore_errors=True)
    return out


def to_pixels(images: NDArray[np.float64]) -> Pixels:
    """From [-1, 1] to the nearest of 0..255, clipped."""
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def estimate_cost(
    real: Source, count: int, config: DiffusionConfig, sampler: SamplerConfig, device: torch.device | str = "cpu"
) -> tuple[int, float, float]:
    """Parameters of the network, and the seconds of training and of sampling on this device, measured in a few."""
    _check_trainable(real, config)
    training = Training(real, config, 0, torch.device(device))
    seconds, denoiser = training.seconds(), training.denoiser.eval()
    model = Diffusion(denoiser, config, real.image_shape, tuple(real.class_names), {})
    sampling = sampling_seconds(diffusion_sampler(model, 0, sampler), count, sampler.batch_size)
    return sum(weight.numel() for weight in denoiser.parameters()), seconds, sampling


def sampling_seconds(sampler: Sampler, count: int, batch_size: int) -> float:
    """Estimated time of sampling ``count`` images: that of a few, or of a batch where these are quick."""
    for size in (4, batch_size):
        few, started = range(min(count, size)), time.perf_counter()
        sampler.sample(np.asarray(few), _labels(few, sampler))
        if (seconds := time.perf_counter() - started) > 0.5:
            break
    return seconds * count / len(few)


def _labels(rows: range, sampler: Sampler) -> Labels:
    """Interleaved, so that any prefix is balanced: 0, 1, 2, ..., 0, 1, ..."""
    return np.asarray(rows, dtype=np.int64) % len(sampler.class_names)


def _check_sampler(config: SamplerConfig, label_dropout: float) -> None:
    """Refuse guidance of a model never trained without labels."""
    if config.guidance != 1 and label_dropout == 0:
        what = f"guidance {config.guidance:g} needs a model that was also trained without labels"
        raise UsageError(what, why="its label_dropout is 0", fix="train one with label_dropout=0.1")


def _check_trainable(real: Source, config: DiffusionConfig) -> None:
    """Refuse real images that do not fit the network (`UsageError`), or of which a class has none (`DataError`)."""
    with torch.device("meta"):  # shapes only
        build_denoiser(config, real.image_shape, real.num_classes)
    check_classes(real.labels, real.name, real.class_names)


def _checked_target(out: Path | str, count: int) -> Path:
    out = Path(out)
    if count < 1:
        raise UsageError(f"count is {count}, not at least 1")
    if out.suffix != ".npz":
        raise UsageError(f"generated images are written as .npz, not {out.name}", fix="end its name in .npz")
    if out.exists() and read_comment(out).get("schema") != SCHEMA:
        raise ResumeError(f"{out} exists and is not ours", fix=_AWAY)
    return out


def _complete(out: Path, checksum: Path, settings: dict[str, Any], count: int) -> bool:
    """Whether ``out`` is there already, complete and whole."""
    if not out.exists():
        return False
    comment = read_comment(out)
    require_same_settings(out, {name: comment.get(name) for name in settings}, settings, fix=_AWAY)
    if comment["count"] > count:
        raise ResumeError(f"{out} holds {comment['count']:,} images, more than the {count:,} asked for", fix=_AWAY)
    if comment["count"] == count and checksum.exists() and checksum.read_text().split()[:1] != [sha256_file(out)]:
        fix = "delete both and run the same command again"
        raise DataError(f"{out} is damaged", why=f"its bytes do not match {checksum.name}", fix=fix)
    return bool(comment["count"] == count)


def _sample_shards(sampler: Sampler, count: int, shards: Shards, config: SamplerConfig, progress: bool) -> list[Path]:
    """Images 0 .. count - 1 as shards, in order; batches never cross one, so its bytes depend on the settings only."""
    rows = {f"{span.start:012d}-{span.stop:012d}": span for span in spans(count, config.shard_rows)}
    missing = shards.missing(rows)
    done = count - sum(len(rows[key]) for key in missing)
    with Progress("sampling", count, "images", show=progress, done=done) as bar:
        for key in missing:
            images = []
            for span in spans(len(rows[key]), config.batch_size):
                batch = rows[key][span.start : span.stop]
                images.append(sampler.sample(np.asarray(batch, dtype=np.int64), _labels(batch, sampler)))
                wanted = (len(batch), *sampler.image_shape)
                if images[-1].shape != wanted or images[-1].dtype != np.uint8:
                    raise UsageError(f"the sampler made {images[-1].dtype} {images[-1].shape}, not uint8 {wanted}")
                bar.advance(len(batch))
            with shards.writing(key) as temporary, temporary.open("wb") as file:
                np.savez(file, image=np.concatenate(images))
    return [shards.path(key) for key in rows]


def load_pipeline(name: str, device: torch.device | str = "cpu") -> Any:
    """Open a diffusers pipeline, a local folder or a name on the hub; `ModelError` if there is none of safetensors."""
    pipelines = import_diffusers("DiffusionPipeline")
    try:
        pipeline = pipelines.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open the pipeline {name!r}", why=first_line(error)) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def pipeline_sampler(
    pipeline: Any,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    class_ids: Sequence[int] | None = None,
    prompt: str = "a photo of a {name}",
    size: int | None = None,
    options: dict[str, Any] | None = None,
) -> Sampler:
    """A diffusers pipeline as a sampler: every image has its own generator, whatever the batch. One is sampled at once.

    Its call takes ``class_labels`` (as `DiTPipeline`): ``class_ids``, one for each of ``class_names``, or 0, 1, 2, ...;
    or ``prompt`` (as `StableDiffusionPipeline`), with the class name for ``{name}``. ``size``: side in pixels to shrink
    images to. ``options`` of each call, such as ``num_inference_steps``. `UsageError` where these do not fit together,
    `CheckError` for NaN images.
    """
    kind, options = type(pipeline).__name__, dict(options or {})
    ids = list(range(len(class_names)) if class_ids is None else class_ids)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    argument = next((name for name in ("class_labels", "prompt") if name in parameters), "")
    if not argument:
        why = "its call takes neither class_labels nor prompt, so its images have no known class"
        fix = "use a class-conditional or text-to-image pipeline"
        raise UsageError(f"{kind} samples without labels", why=why, fix=fix)
    if unknown := sorted(set(options) - set(parameters)):
        raise UsageError(f"{kind} takes no option {', '.join(unknown)}", fix=f"it takes: {', '.join(parameters)}")
    if len(ids) != len(class_names) or not ids:
        raise UsageError(f"{len(ids)} class ids for {len(class_names)} class names")
    if argument == "prompt" and "{name}" not in prompt:
        raise UsageError(f"the prompt {prompt!r} is the same for every class", fix='write "a photo of a {name}"')
    conditions: list[Any] = ids if argument == "class_labels" else [prompt.format(name=name) for name in class_names]

    def sample(indices: Labels, labels: Labels) -> Pixels:
        seeds = [torch_seed(seed, Stream.LATENT, 0, index) for index in indices.tolist()]
        sampled = pipeline(
            **{argument: [conditions[label] for label in labels.tolist()]},
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            output_type="np",
            **options,
        ).images
        images = np.asarray(sampled, dtype=np.float64)
        if not np.isfinite(images).all():
            why = "half precision overflows in some pipelines"
            raise CheckError(f"{kind} returned NaN images", why=why, fix="load it in float32 or bfloat16")
        pixels = np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)
        return pixels if size is None else resized(pixels, size)

    modules = {name: part for name, part in sorted(pipeline.components.items()) if isinstance(part, torch.nn.Module)}
    identity = {
        "pipeline": kind,
        "weights": fingerprint({name: weights_sha256(module) for name, module in modules.items()}),
        "scheduler": fingerprint({key: repr(value) for key, value in dict(pipeline.scheduler.config).items()}),
        "diffusers": import_diffusers("__version__"),
        "seed": seed,
        "conditions": conditions,
        "size": size,
        "options": {name: repr(value) for name, value in sorted(options.items())},
    }
    height, width, channels = sample(np.zeros(1, np.int64), np.zeros(1, np.int64)).shape[1:]
    return Sampler(sample, identity, (height, width, channels), tuple(class_names))
