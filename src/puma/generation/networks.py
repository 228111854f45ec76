"""Settings of a diffusion model, and its networks: a residual MLP for 8 to 16 pixels, diffusers' UNet from 16 pixels.

A network maps the scaled noisy image [B, C, H, W], c_noise = ln(sigma) / 4 [B], the label int64 [B] (``num_classes``
means none) and the augmentation vector [B, A] or None (all zero) to a tensor of the image's shape; it starts at zero.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from puma.errors import UsageError

AUGMENT_DIM = 8
"""Length of the vector: mirrored, whole-pixel shift (y, x), fractional shift (y, x), log2 scale, sin, 1 - cos."""

Settings = TypeVar("Settings", bound=BaseModel)


class DiffusionConfig(BaseModel):
    """A diffusion model and its training; images are in [-1, 1] and noise levels in that unit.

    ``width`` is that of the MLP, or the channels of the UNet's first level; ``multipliers`` (of each level, in widths;
    each after the first halves the image) and ``attention`` (heights in pixels of levels with self-attention) are the
    UNet's. ``ema``: decay of the weights that sample; ``noise_mean`` and ``noise_std``: of ln(sigma);
    ``label_dropout``: share of images shown without their label, above 0 for guidance; ``shift``, ``flip`` and
    ``warp``: probabilities of `augment`. ``compile`` is ignored on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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


_FOR_32_PIXELS = DiffusionConfig(
    network="unet", width=96, blocks=2, dropout=0.1, steps=30_000, batch_size=512, learning_rate=1e-3,
    warmup=2_000, ema=0.9995, label_dropout=0.1, shift=0.12, flip=0.5, warp=0.12, precision="bf16", compile=True,
)  # fmt: skip


def diffusion_config(image_shape: tuple[int, int, int], **changes: Any) -> DiffusionConfig:
    """The settings for images (H, W, C), with some changed: up to 16 pixels the MLP, up to 64 a UNet for a GPU."""
    largest = max(image_shape[:2])
    if largest > 64:
        what = f"no settings for images of {image_shape[0]}x{image_shape[1]} pixels"
        fix = "load the images with resize=32, or use a diffusers pipeline of your own"
        raise UsageError(what, why="our diffusion models are for 8 to 64 pixels", fix=fix)
    start = DiffusionConfig() if largest <= 16 else _FOR_32_PIXELS
    return validated(DiffusionConfig, start.model_dump() | changes)


def validated(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Build settings from plain values; one `UsageError` names every setting that is unknown or out of range."""
    try:
        return kind(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"bad settings: {problems}", fix=f"there are: {', '.join(kind.model_fields)}") from None


class _ResidualMLP(nn.Module):
    """The network F on the flattened image; by far the most training steps per second on a CPU."""

    frequencies: Tensor

    def __init__(self, config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        size, width = math.prod(shape), config.width
        frequencies = torch.linspace(math.log(0.5), math.log(50.0), 32).exp()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise_in = nn.Linear(64, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.augment = nn.Linear(AUGMENT_DIM, width, bias=False) if config.augments else None
        self.condition = nn.Linear(width, width)
        self.linear_in = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_MLPBlock(width, config.dropout) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.linear_out = _zero_init(nn.Linear(width, size))

    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        angle = noise[:, None] * self.frequencies  # Fourier features of the noise level
        condition: Tensor = self.noise_in(torch.cat([angle.cos(), angle.sin()], dim=1)) + self.label(label)
        if self.augment is not None and augment is not None:
            condition = condition + self.augment(augment)
        condition = functional.silu(self.condition(functional.silu(condition)))
        hidden = self.linear_in(image.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        result: Tensor = self.linear_out(functional.silu(self.norm(hidden)))
        return result.view_as(image)


class _MLPBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = _zero_init(nn.Linear(width, 2 * width))
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, dim=1)
        inner = functional.silu(self.first(self.norm(hidden) * (1 + scale) + shift))
        result: Tensor = hidden + self.second(self.dropout(inner))
        return result


class _DiffusersUNet(nn.Module):
    """diffusers' ``UNet2DModel`` as the network F: label and augmentation are added to its noise embedding.

    Every residual branch and the last layer start at zero, as in Karras et al. 2022.
    """

    def __init__(self, config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, _ = shape
        width, levels = config.width, range(len(config.multipliers))
        attention = ["Attn" if height >> level in config.attention else "" for level in levels]
        self.unet: Any = import_diffusers("UNet2DModel")(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(width * multiplier for multiplier in config.multipliers),
            layers_per_block=config.blocks,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in attention),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attention)),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
            dropout=config.dropout,
            attention_head_dim=math.gcd(width, 64),
            norm_num_groups=next(groups for groups in range(min(32, width // 4), 0, -1) if width % groups == 0),
        )
        _zero_init(self.unet.conv_out)
        for module in self.unet.modules():
            if type(module).__name__ in ("ResnetBlock2D", "Attention"):
                _zero_init(module.conv2 if hasattr(module, "conv2") else module.to_out[0])
        self.label = nn.Embedding(num_classes + 1, 4 * width)
        self.augment = nn.Linear(AUGMENT_DIM, 4 * width, bias=False) if config.augments else None

    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        condition = self.label(label)
        if self.augment is not None and augment is not None:
            condition = condition + self.augment(augment)
        # its sinusoidal embedding expects time steps of 0 to 1000; c_noise is about -2 to 2
        image = image.contiguous(memory_format=torch.channels_last)
        result: Tensor = self.unet(image, 1000 * noise, class_labels=condition).sample
        return result


def build_network(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network of a configuration for images [C, H, W], with weights from torch's global generator.

    `UsageError` for images whose sides the UNet's levels cannot halve, or a UNet without diffusers.
    """
    if config.network == "mlp":
        return _ResidualMLP(config, shape, num_classes)
    halvings = len(config.multipliers) - 1
    if shape[1] % 2**halvings or shape[2] % 2**halvings:
        why = f"its levels halve them {halvings} times: sizes must be divisible by {2**halvings}"
        fix = "load them with resize=, or give fewer multipliers"
        raise UsageError(f"images of {shape[1]}x{shape[2]} pixels do not fit the UNet", why=why, fix=fix)
    network = _DiffusersUNet(config, shape, num_classes)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # torch: for tensors only


def import_diffusers(name: str) -> Any:
    """A class of the diffusers library, an extra; `UsageError` where it cannot be imported."""
    try:
        import diffusers

        return getattr(diffusers, name)
    except (ImportError, RuntimeError) as error:  # the latter beside a torchvision of another torch
        why = f"UNets and pretrained pipelines need it: {str(error).splitlines()[-1]}"
        fix = "pip install 'puma-robust[diffusers]'"
        raise UsageError("diffusers is not installed, or cannot be imported", why=why, fix=fix) from None


def _zero_init(layer: nn.Linear | nn.Conv2d) -> Any:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
