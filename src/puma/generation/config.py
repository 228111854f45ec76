"""Settings of a diffusion model and of its sampler: frozen, checked, saved beside the result."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puma.errors import UsageError, unknown

Settings = TypeVar("Settings", bound=BaseModel)


class DiffusionConfig(BaseModel):
    """A diffusion model and its training; images are in [-1, 1] and noise levels in that unit.

    Args:
        network: ``"mlp"`` up to 16 pixels, ``"unet"`` from 16.
        width: units of the MLP, or channels of the UNet's first level.
        blocks: residual blocks, of the UNet per level.
        multipliers: UNet only: channels of each level, in widths; every level after the first halves the image.
        attention: UNet only: heights in pixels of the levels with self-attention.
        dropout: inside the blocks.
        steps: optimiser steps.
        batch_size: images per step.
        learning_rate: of Adam, at its peak.
        warmup: steps of linear warm-up; afterwards half a cosine down to zero.
        ema: decay of the weights' moving average, which is the model that samples.
        sigma_data: standard deviation of the pixels, in [-1, 1].
        noise_mean: mean of ln(sigma) in training.
        noise_std: standard deviation of ln(sigma) in training.
        label_dropout: share of images shown without their label; above 0 allows guidance.
        shift: probability of a whole-pixel shift of a training image; this and the next two do not leak.
        flip: probability of exchanging left and right.
        warp: probability of scaling, of rotating and of shifting with interpolation.
        precision: of the network; the rest is float32 and the sampler's state float64.
        compile: compile the network on a GPU (ignored on a CPU).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Literal["mlp", "unet"] = "mlp"
    width: int = Field(default=192, ge=8, le=4096)
    blocks: int = Field(default=3, ge=1, le=64)
    multipliers: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(default=(1, 2, 2), min_length=1, max_length=8)
    attention: tuple[int, ...] = Field(default=(16, 8), max_length=8)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    steps: int = Field(default=1600, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup: int = Field(default=200, ge=0)
    ema: float = Field(default=0.999, ge=0, lt=1)
    sigma_data: float = Field(default=0.5, gt=0)
    noise_mean: float = -1.2
    noise_std: float = Field(default=1.2, gt=0)
    label_dropout: float = Field(default=0.0, ge=0, lt=1)
    shift: float = Field(default=0.5, ge=0, le=1)
    flip: float = Field(default=0.0, ge=0, le=1)
    warp: float = Field(default=0.0, ge=0, le=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    @property
    def augments(self) -> bool:
        """Whether training images are changed, so that the network needs the augmentation vector as an input."""
        return max(self.shift, self.flip, self.warp) > 0


class SamplerConfig(BaseModel):
    """Settings of the sampler: Karras et al. 2022, algorithm 1 (``churn=0``) or 2."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=18, ge=1)
    sigma_min: float = Field(default=0.002, gt=0)
    sigma_max: float = Field(default=80.0, gt=0)
    rho: float = Field(default=7.0, gt=0)
    churn: float = Field(default=0.0, ge=0)
    churn_low: float = Field(default=0.0, ge=0)
    churn_high: float = Field(default=1e9, ge=0)
    churn_scale: float = Field(default=1.0, gt=0)
    guidance: float = Field(default=1.0, ge=0)
    labels: Literal["balanced", "real"] = "balanced"
    batch_size: int = Field(default=512, ge=1)
    shard_rows: int = Field(default=2048, ge=1)


PRESETS: dict[str, DiffusionConfig] = {
    "digits": DiffusionConfig(),
    "small-32": DiffusionConfig(
        network="unet", width=96, blocks=2, dropout=0.1, steps=30_000, batch_size=512, learning_rate=1e-3,
        warmup=2_000, ema=0.9995, label_dropout=0.1, shift=0.12, flip=0.5, warp=0.12, precision="bf16", compile=True,
    ),
}  # fmt: skip
"""``digits`` for 8 to 16 pixels, minutes on one CPU core; ``small-32`` for 32 pixels, meant for a GPU."""


def diffusion_config(image_shape: tuple[int, int, int], preset: str | None = None, **changes: Any) -> DiffusionConfig:
    """The preset of that name, or the one for images (H, W, C), with some of its settings changed.

    Raises:
        UsageError: no such preset, none for images of this size, or a setting that is unknown or out of range.
    """
    largest = max(image_shape[:2])
    if preset is None and largest > 64:
        raise UsageError(
            f"no preset for images of {image_shape[0]}x{image_shape[1]} pixels",
            why="our diffusion models are for 8 to 64 pixels",
            fix="load the images with resize=32, or use a diffusers pipeline of your own",
        )
    name = preset or ("digits" if largest <= 16 else "small-32")
    if name not in PRESETS:
        raise unknown("diffusion preset", name, PRESETS)
    return validated(DiffusionConfig, PRESETS[name].model_dump() | changes)


def validated(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Build settings from plain values; one error names all that is wrong.

    Raises:
        UsageError: naming every setting that is unknown or out of range.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"bad settings: {problems}", fix=f"there are: {', '.join(kind.model_fields)}") from None
