"""A class-conditional diffusion model: training on a source of real images, checkpoints, saving and loading.

All randomness is a function of (seed, step), so a resumed training equals an uninterrupted one bit for bit on the
same machine type, thread count and library versions.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from puma.checkpoints import load_state, pack, save_state, unpack
from puma.data.source import Source
from puma.devices import environment
from puma.errors import CheckError, ModelError, UsageError
from puma.generation.edm import Denoiser, loss, sample_sigma
from puma.generation.networks import AUGMENT_DIM, DiffusionConfig, build_network, validated
from puma.io import claim_folder, lock
from puma.models.weights import EMA, load_tensors, load_weights, ramped_decay, save_tensors
from puma.progress import Progress
from puma.rng import Stream, counter_generator, torch_seed

SCHEMA = "puma.diffusion/1"
_SHIFT = 0.125  # largest whole-pixel shift, and standard deviation of the fractional one, in image sizes
_SCALE, _ANGLE = 0.2, 0.3  # standard deviation of log2; largest angle in radians: small, for a 6 upside down is a 9
_MICRO_BATCH = 16  # images per backward pass of the UNet on a CPU: bounds memory, and the wait after Ctrl-C


@dataclass(frozen=True, repr=False)
class Diffusion:
    """A trained denoiser (the EMA weights, in eval mode) with its configuration.

    ``image_shape`` is (H, W, C); ``made_from`` holds seed, fingerprint of the real images and versions, JSON-able.
    """

    denoiser: Denoiser
    config: DiffusionConfig
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    made_from: dict[str, Any]

    def save(self, folder: Path | str) -> None:
        """Write ``model.safetensors`` into ``folder``, atomically, with the configuration and a checksum inside."""
        meta = {"config": self.config.model_dump(mode="json"), "image_shape": list(self.image_shape)}
        meta |= {"class_names": list(self.class_names), "made_from": self.made_from}
        save_tensors(self.denoiser.state_dict(), Path(folder) / "model.safetensors", SCHEMA, meta)

    @classmethod
    def load(cls, folder: Path | str) -> Diffusion:
        """Read what `save` wrote; `ModelError` where it is missing, damaged or not of its configuration."""
        path = Path(folder) / "model.safetensors"
        tensors, meta = load_tensors(path, SCHEMA)
        try:
            height, width, channels = (int(size) for size in meta["image_shape"])
            config = validated(DiffusionConfig, meta["config"])
            names, made_from = tuple(str(name) for name in meta["class_names"]), dict(meta["made_from"])
            with torch.device("meta"):  # shapes only: what a forged configuration asks for costs no memory
                planned = build_denoiser(config, (height, width, channels), len(names))
            load_weights(planned, {name: tensor.to("meta") for name, tensor in tensors.items()}, path)
        except (UsageError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ModelError(f"{path} has a configuration that builds no diffusion model", why=str(error)) from None
        denoiser = build_denoiser(config, (height, width, channels), len(names))
        load_weights(denoiser, tensors, path)
        return cls(denoiser.eval().requires_grad_(False), config, (height, width, channels), names, made_from)

    def to(self, device: torch.device | str) -> Diffusion:
        """The same model with its weights on ``device``, compiled there if its configuration asks for it."""
        self.denoiser.to(device)
        if self.config.compile and torch.device(device).type == "cuda":
            self.denoiser.network.compile()
        return self


def build_denoiser(config: DiffusionConfig, image_shape: tuple[int, int, int], num_classes: int) -> Denoiser:
    """An untrained denoiser for images (H, W, C); initialised from torch's global generator, so fork that first."""
    height, width, channels = image_shape
    network = build_network(config, (channels, height, width), num_classes)
    return Denoiser(network, config.sigma_data, bf16=config.precision == "bf16")


def train_diffusion(
    real: Source,
    folder: Path | str,
    *,
    config: DiffusionConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint_every: int = 500,
    progress: bool = False,
) -> Diffusion:
    """Train (or finish training, or just load) the diffusion model of ``folder`` on ``real``.

    ``folder`` receives ``model.safetensors``, and every ``checkpoint_every`` steps a checkpoint, which changes nothing
    in the result; ``seed`` decides initial weights and every batch. `ResumeError` if the folder holds a model of other
    data or settings, `CheckError` if the loss became infinite or NaN.
    """
    folder, device = Path(folder), torch.device(device)
    made_from = {"fingerprint": real.fingerprint, "rows": len(real), "seed": seed}
    settings = {"config": config.model_dump(mode="json"), **made_from}
    machine, checkpoints = environment(device), folder / "checkpoints"
    with lock(folder):
        claim_folder(folder, settings, environment=machine, schema=SCHEMA)
        if (folder / "model.safetensors").exists():
            model = Diffusion.load(folder)
            shutil.rmtree(checkpoints, ignore_errors=True)
            return model.to(device)
        training = Training(real, config, seed, device)
        if (state := load_state(checkpoints)) is not None:
            unpack(state[0], training.denoiser, training.ema.model, training.optimizer)
            training.step = int(state[1]["step"])
        with Progress("training the diffusion model", config.steps, "steps", show=progress, done=training.step) as bar:
            while training.step < config.steps:
                value = training.take_step()
                if training.step % checkpoint_every == 0 and training.step < config.steps:
                    tensors = pack(training.denoiser, training.ema.model, training.optimizer)
                    save_state(checkpoints, training.step, tensors, {})
                bar.advance(note=f"loss {value:.3f}")
        made_from |= {"source": real.name, **machine}
        denoiser = cast(Denoiser, training.ema.model)
        model = Diffusion(denoiser, config, real.image_shape, tuple(real.class_names), made_from)
        model.save(folder)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return model.to(device)


class Training:
    """Weights, moving average and optimiser of a training, and its step; batch k is a function of (seed, k)."""

    def __init__(self, real: Source, config: DiffusionConfig, seed: int, device: torch.device) -> None:
        self.real, self.config, self.seed, self.device, self.step = real, config, seed, device, 0
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch_seed(seed, Stream.INIT))
            self.denoiser = build_denoiser(config, real.image_shape, real.num_classes).to(device).train()
        self.ema = EMA(self.denoiser)
        if config.compile and device.type == "cuda":
            self.denoiser.network.compile()
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=config.learning_rate, fused=True)
        self.micro_batch = _MICRO_BATCH if config.network == "unet" and device.type == "cpu" else config.batch_size

    def seconds(self) -> float:
        """Estimated time of all steps here: that of one (on a CPU smaller) step, scaled up."""
        config, small = self.config, min(self.config.batch_size, self.micro_batch)
        self.config = config.model_copy(update={"batch_size": small})
        self.take_step()
        started = time.perf_counter()
        self.take_step()
        return (time.perf_counter() - started) * config.steps * config.batch_size / small

    def take_step(self) -> float:
        """One optimiser step; returns its loss. `CheckError` if that is not finite: the weights stay as they were."""
        config, step, device = self.config, self.step, self.device
        generator = torch.Generator(device).manual_seed(torch_seed(self.seed, Stream.STEP, step, 1))
        images, labels = self._batch()
        dropped = torch.rand(len(labels), generator=generator, device=device) < config.label_dropout
        labels, applied = torch.where(dropped, self.real.num_classes, labels), None
        if config.augments:
            images, applied = augment(images, generator, shift=config.shift, flip=config.flip, warp=config.warp)
        sigma = sample_sigma(len(images), config.noise_mean, config.noise_std, generator)
        noise = torch.randn(images.shape, generator=generator, device=device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        total = 0.0
        # Dropout reads torch's global generator: set it for this step, and restore it afterwards.
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cards, enabled=config.dropout > 0):
            if config.dropout > 0:
                torch.manual_seed(torch_seed(self.seed, Stream.STEP, step, 2))
            for start in range(0, len(images), self.micro_batch):
                rows = slice(start, start + self.micro_batch)
                vector = None if applied is None else applied[rows]
                losses = loss(self.denoiser, images[rows], labels[rows], sigma[rows], noise[rows], vector)
                value = losses.sum() / len(images)
                torch.autograd.backward(value)
                total += float(value.detach())
        if not np.isfinite(total):
            why, fix = "training diverged; nothing of this step was kept", "lower learning_rate, or lengthen warmup"
            raise CheckError(f"the diffusion loss is {total} at step {step}", why=why, fix=fix)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.denoiser, ramped_decay(config.ema, step))
        self.step += 1
        return total

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Images float32 [B, C, H, W] in [-1, 1] and labels int64 [B] of this step, sampled with replacement."""
        random = counter_generator(self.seed, Stream.STEP, self.step)
        rows = np.sort(random.integers(len(self.real), size=self.config.batch_size))
        images = torch.from_numpy(self.real.read(rows)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images.contiguous(), torch.from_numpy(self.real.labels[rows]).to(self.device)


def learning_rate(config: DiffusionConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    return config.learning_rate * warm * 0.5 * (1 + float(np.cos(np.pi * step / config.steps)))


def augment(
    images: Tensor, generator: torch.Generator, *, shift: float = 0.0, flip: float = 0.0, warp: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Change some images [B, C, H, W] and describe the change (Karras et al. 2022, section 5); borders are repeated.

    Returns the images and float32 [B, AUGMENT_DIM], zero where nothing was done. Probabilities: ``shift`` by whole
    pixels, up to 1/8 of the size each way (blurs nothing); ``flip``, left and right; ``warp`` of scaling, of rotating
    and of a fractional shift, each on its own (bilinear).
    """
    count, device = len(images), images.device
    applied = torch.zeros(count, AUGMENT_DIM, device=device)

    def chosen(probability: float) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device) < probability

    if flip > 0:
        mirrored = chosen(flip)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        applied[:, 0] = mirrored.float()
    if shift > 0:
        moved, sources = chosen(shift), []
        for column, length in enumerate(images.shape[2:], start=1):
            reach = max(1, round(_SHIFT * length))
            by = torch.randint(-reach, reach + 1, (count,), generator=generator, device=device) * moved
            sources.append((torch.arange(length, device=device) + by[:, None]).clamp(0, length - 1))
            applied[:, column] = by / reach
        each, rows, columns = torch.arange(count, device=device)[:, None, None], *sources
        images = images.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if warp > 0:
        moved, scaled, rotated = (chosen(warp).float() for _ in range(3))
        shift_y, shift_x, scale = (
            which * torch.randn(count, generator=generator, device=device) * deviation
            for which, deviation in ((moved, _SHIFT), (moved, _SHIFT), (scaled, _SCALE))
        )
        angle = rotated * _ANGLE * (2 * torch.rand(count, generator=generator, device=device) - 1)
        applied[:, 3:] = torch.stack([shift_y, shift_x, scale, angle.sin(), 1 - angle.cos()], dim=1)
        zoom, aspect = torch.exp2(-scale), images.shape[2] / images.shape[3]
        matrix = [
            torch.stack([zoom * angle.cos(), -zoom * angle.sin() * aspect, -2 * shift_x], dim=1),
            torch.stack([zoom * angle.sin() / aspect, zoom * angle.cos(), -2 * shift_y], dim=1),
        ]
        grid = functional.affine_grid(torch.stack(matrix, dim=1), list(images.shape), align_corners=False)
        warped = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        images = torch.where((applied[:, 3:] != 0).any(1)[:, None, None, None], warped, images)
    return images, applied
