"""Settings of a diffusion model and of its sampler: frozen, checked, saved beside the result."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from puma.errors import UsageError, unknown

Settings = TypeVar("Settings", bound=BaseModel)


class DiffusionConfig(BaseModel):
    """What is trained and how; images are in [-1, 1] and noise levels in that unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: Literal["mlp"] = "mlp"
    width: int = Field(default=192, ge=8)
    blocks: int = Field(default=3, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    steps: int = Field(default=1200, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup: int = Field(default=200, ge=0)
    ema: float = Field(default=0.999, ge=0, lt=1)
    sigma_data: float = Field(default=0.5, gt=0)
    noise_mean: float = -1.2
    noise_std: float = Field(default=1.2, gt=0)
    label_dropout: float = Field(default=0.0, ge=0, lt=1)
    augment: float = Field(default=0.0, ge=0, le=1)
    flip: bool = False


class SamplerConfig(BaseModel):
    """How images are drawn: Karras et al. 2022, algorithm 1 (``churn=0``) or 2."""

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
    part_rows: int = Field(default=2048, ge=1)


PRESETS: dict[str, DiffusionConfig] = {"digits": DiffusionConfig()}


def differences(found: Any, wanted: Any, name: str) -> list[str]:
    """What differs between two JSON values, one short phrase each.

    >>> differences({"steps": 50, "seed": 0}, {"steps": 60, "seed": 0}, "config")
    ['config.steps is 50, not 60']
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [line for key in keys for line in differences(found.get(key), wanted.get(key), f"{name}.{key}")]
    return [] if found == wanted else [f"{name} is {found!r}, not {wanted!r}"]


def preset(name: str, **changes: Any) -> DiffusionConfig:
    """A shipped configuration, with some of its settings changed.

    Raises:
        UsageError: no such preset, or a setting that does not exist or cannot have that value.
    """
    if name not in PRESETS:
        raise unknown("diffusion preset", name, PRESETS)
    return checked(DiffusionConfig, PRESETS[name].model_dump() | changes)


def checked(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Build settings from plain values, all problems told at once.

    Raises:
        UsageError: naming every setting that is unknown or out of range.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"bad settings: {told}", fix=f"there are: {', '.join(kind.model_fields)}") from None
