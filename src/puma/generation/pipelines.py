"""Images from a class-conditional or text-to-image pipeline of the ``diffusers`` library, as an optional backend.

For users who have a pretrained pipeline already: a `PipelineDrawer` takes the place of our own diffusion model in
`puma.generation.generate_from`. Needs the extra ``puma-robust[diffusers]``; nothing here imports it before use.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from puma.errors import CheckError, ModelError, UsageError
from puma.io import fingerprint
from puma.models.weights import weights_sha256
from puma.rng import Stream, torch_seed


def load_pipeline(place: str, device: torch.device | str = "cpu") -> Any:
    """Open a diffusers pipeline: a local folder, or a name on the hub; safetensors only, never pickles.

    Raises:
        UsageError: diffusers is not installed, or a torchvision that does not fit torch keeps it from loading.
        ModelError: there is no such pipeline, or its weights are not safetensors.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise UsageError(
            "diffusers is not installed",
            why="pipelines of others are an optional backend",
            fix="pip install 'puma-robust[diffusers]'",
        ) from None
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise UsageError(
            "diffusers cannot be imported beside the installed torchvision",
            why=str(error).splitlines()[-1],
            fix="uninstall torchvision, or install the one that matches this torch",
        ) from None
    if place.startswith((".", "/", "~")) and not Path(place).is_dir():
        raise ModelError(f"cannot open the pipeline {place!r}", why="there is no such folder")
    try:
        pipeline = DiffusionPipeline.from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot open the pipeline {place!r}", why=str(error).splitlines()[0]) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


class PipelineDrawer:
    """A diffusers pipeline as a drawer: every image has its own generator, so that batches do not matter.

    Args:
        pipeline: its call takes ``class_labels`` (as `DiTPipeline`) or ``prompt`` (as `StableDiffusionPipeline`).
        class_names: one name per label.
        seed: decides the images.
        class_ids: the pipeline's class for each label; None for 0, 1, 2, ...
        prompt: text with ``{name}`` in the place of the class name.
        size: side in pixels to shrink images to; None keeps what the pipeline draws.
        options: further arguments of each call, such as ``num_inference_steps`` and ``guidance_scale``.

    Raises:
        UsageError: the pipeline knows no labels, or class ids, names and prompt do not fit together.
    """

    def __init__(
        self,
        pipeline: Any,
        class_names: Sequence[str],
        *,
        seed: int = 0,
        class_ids: Sequence[int] | None = None,
        prompt: str = "a photo of a {name}",
        size: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.pipeline, self.seed, self.size = pipeline, seed, size
        self.class_names = tuple(class_names)
        self.options = dict(options or {})
        self.class_ids = tuple(range(len(self.class_names)) if class_ids is None else class_ids)
        self.prompt = prompt
        takes = inspect.signature(type(pipeline).__call__).parameters
        self.takes = next((name for name in ("class_labels", "prompt") if name in takes), "")
        if not self.takes:
            raise UsageError(
                f"{type(pipeline).__name__} draws without labels",
                why="its call takes neither class_labels nor prompt, so nobody knows what its images show",
                fix="use a class-conditional or text-to-image pipeline",
            )
        unknown = sorted(set(self.options) - set(takes))
        if unknown:
            raise UsageError(
                f"{type(pipeline).__name__} takes no option {', '.join(unknown)}", fix=f"it takes: {', '.join(takes)}"
            )
        if len(self.class_ids) != len(self.class_names) or not self.class_names:
            raise UsageError(f"{len(self.class_ids)} class ids for {len(self.class_names)} class names")
        if self.takes == "prompt" and "{name}" not in prompt:
            raise UsageError(f"the prompt {prompt!r} is the same for every class", fix='write "a photo of a {name}"')

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Kind, weights, seed and every argument of the calls."""
        import diffusers

        modules = {
            name: weights_sha256(part)
            for name, part in sorted(self.pipeline.components.items())
            if isinstance(part, torch.nn.Module)
        }
        scheduler = {key: repr(value) for key, value in dict(self.pipeline.scheduler.config).items()}
        return {
            "pipeline": type(self.pipeline).__name__,
            "weights": fingerprint(modules),
            "scheduler": fingerprint(scheduler),
            "diffusers": diffusers.__version__,
            "seed": self.seed,
            "conditions": list(self.class_ids) if self.takes == "class_labels" else self._prompts(),
            "size": self.size,
            "options": {name: repr(value) for name, value in sorted(self.options.items())},
        }

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C), found by drawing one image: this also tells early whether the pipeline works at all."""
        height, width, channels = self(np.zeros(1, np.int64), np.zeros(1, np.int64)).shape[1:]
        return height, width, channels

    def __call__(self, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images ``indices`` under ``labels``; uint8 [B, H, W, C].

        Raises:
            CheckError: the pipeline drew NaN.
        """
        conditions: Sequence[Any] = self.class_ids if self.takes == "class_labels" else self._prompts()
        generators = [
            torch.Generator().manual_seed(torch_seed(self.seed, Stream.LATENT, 0, index)) for index in indices.tolist()
        ]
        drawn = self.pipeline(
            **{self.takes: [conditions[label] for label in labels.tolist()]},
            generator=generators,
            output_type="np",
            **self.options,
        ).images
        images = np.asarray(drawn, dtype=np.float64)
        if not np.isfinite(images).all():
            raise CheckError(
                f"{type(self.pipeline).__name__} drew NaN",
                why="half precision overflows in some pipelines",
                fix="load it in float32 or bfloat16",
            )
        pixels = np.clip(np.rint(images * 255), 0, 255).astype(np.uint8)
        return pixels if self.size is None else np.stack([_shrunk(image, self.size) for image in pixels])

    def _prompts(self) -> list[str]:
        return [self.prompt.format(name=name) for name in self.class_names]


def _shrunk(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    from PIL import Image

    channels = image.shape[2]
    resized = Image.fromarray(image[:, :, 0] if channels == 1 else image).resize(
        (size, size), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    return np.asarray(resized).reshape(size, size, channels)
