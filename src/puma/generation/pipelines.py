"""Sample images from a class-conditional or text-to-image pipeline of the ``diffusers`` library (an extra).

A `pipeline_sampler` takes the place of our own diffusion model in `puma.generation.generate_from`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from puma.errors import CheckError, ModelError, UsageError
from puma.generation.networks import import_diffusers
from puma.generation.sampling import Sampler
from puma.io import fingerprint
from puma.models.weights import weights_sha256
from puma.rng import Stream, torch_seed


def load_pipeline(name: str, device: torch.device | str = "cpu") -> Any:
    """Open a diffusers pipeline: a local folder, or a name on the hub; safetensors only, never pickles.

    Raises:
        UsageError: diffusers is not installed or cannot be imported.
        ModelError: there is no such pipeline, or its weights are not safetensors.
    """
    pipelines = import_diffusers("DiffusionPipeline")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ModelError(f"cannot open the pipeline {name!r}", why="there is no such folder")
    try:
        pipeline = pipelines.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open the pipeline {name!r}", why=str(error).splitlines()[0]) from None
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
    """A diffusers pipeline as a sampler: every image has its own generator, whatever the batch.

    One image is sampled at once, so that a pipeline that does not work fails before the work.

    Args:
        pipeline: its call takes ``class_labels`` (as `DiTPipeline`) or ``prompt`` (as `StableDiffusionPipeline`).
        class_names: one name per label.
        seed: decides the images.
        class_ids: the pipeline's class for each label; None for 0, 1, 2, ...
        prompt: text with ``{name}`` in the place of the class name.
        size: side in pixels to shrink images to; None keeps the pipeline's.
        options: further arguments of each call, such as ``num_inference_steps`` and ``guidance_scale``.

    Raises:
        UsageError: the pipeline takes no labels, or class ids, names and prompt do not fit together.
        CheckError: its images are NaN.
    """
    kind, options = type(pipeline).__name__, dict(options or {})
    ids = list(range(len(class_names)) if class_ids is None else class_ids)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    argument = next((name for name in ("class_labels", "prompt") if name in parameters), "")
    if not argument:
        raise UsageError(
            f"{kind} samples without labels",
            why="its call takes neither class_labels nor prompt, so its images have no known class",
            fix="use a class-conditional or text-to-image pipeline",
        )
    if unknown := sorted(set(options) - set(parameters)):
        raise UsageError(f"{kind} takes no option {', '.join(unknown)}", fix=f"it takes: {', '.join(parameters)}")
    if len(ids) != len(class_names) or not ids:
        raise UsageError(f"{len(ids)} class ids for {len(class_names)} class names")
    if argument == "prompt" and "{name}" not in prompt:
        raise UsageError(f"the prompt {prompt!r} is the same for every class", fix='write "a photo of a {name}"')
    conditions: list[Any] = ids if argument == "class_labels" else [prompt.format(name=name) for name in class_names]

    def sample(indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        seeds = [torch_seed(seed, Stream.LATENT, 0, index) for index in indices.tolist()]
        sampled = pipeline(
            **{argument: [conditions[label] for label in labels.tolist()]},
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            output_type="np",
            **options,
        ).images
        images = np.asarray(sampled, dtype=np.float64)
        if not np.isfinite(images).all():
            raise CheckError(
                f"{kind} returned NaN images",
                why="half precision overflows in some pipelines",
                fix="load it in float32 or bfloat16",
            )
        pixels = np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)
        return pixels if size is None else np.stack([_resized(image, size) for image in pixels])

    modules = {
        name: weights_sha256(module)
        for name, module in sorted(pipeline.components.items())
        if isinstance(module, torch.nn.Module)
    }
    identity = {
        "pipeline": kind,
        "weights": fingerprint(modules),
        "scheduler": fingerprint({key: repr(value) for key, value in dict(pipeline.scheduler.config).items()}),
        "diffusers": import_diffusers("__version__"),
        "seed": seed,
        "conditions": conditions,
        "size": size,
        "options": {name: repr(value) for name, value in sorted(options.items())},
    }
    height, width, channels = sample(np.zeros(1, np.int64), np.zeros(1, np.int64)).shape[1:]
    return Sampler(sample, identity, (height, width, channels), tuple(class_names))


def _resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    from PIL import Image

    channels = image.shape[2]
    resized = Image.fromarray(image[:, :, 0] if channels == 1 else image).resize(
        (size, size), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    return np.asarray(resized).reshape(size, size, channels)
