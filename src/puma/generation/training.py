"""Train a diffusion model on a source of real images; interrupted, the same call goes on where it stopped.

All randomness is a function of (seed, step), so a resumed training equals an uninterrupted one bit for bit on the
same machine type, thread count and library versions.
"""

from __future__ import annotations

import copy
import json
import logging
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma._version import __version__
from puma.data.source import Source
from puma.distribute import processor
from puma.errors import CheckError, ModelError, ResumeError
from puma.generation.augment import augment
from puma.generation.config import DiffusionConfig, differences
from puma.generation.diffusion import Diffusion, build_denoiser
from puma.generation.edm import Denoiser, draw_sigma, loss
from puma.io import lock, prepare_folder
from puma.models.weights import write_safetensors
from puma.progress import Progress
from puma.rng import Stream, counter_generator, torch_seed

_IN_MEMORY = 2 << 30
_DECIDES = ("config", "fingerprint", "rows", "seed")
_ROUNDS = ("torch", "machine", "device", "processor", "threads")

_log = logging.getLogger("puma")


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

    Args:
        real: uint8 images with labels.
        folder: receives ``model.safetensors`` and ``config.json``, and a checkpoint while training.
        config: network, optimiser and noise distribution.
        seed: decides initial weights and every batch.
        device: where to train.
        checkpoint_every: steps between checkpoints; changes nothing in the result.
        progress: show a bar.

    Raises:
        ResumeError: the folder holds a model of other data or settings, or another process is at work there.
        CheckError: the loss became infinite or NaN.
    """
    folder = prepare_folder(folder)
    made_from = provenance(real, seed, device)
    wanted = {"config": config.model_dump(mode="json"), **made_from}
    with lock(folder):
        if (folder / "config.json").exists():
            model = Diffusion.load(folder)
            _same(folder, {"config": model.config.model_dump(mode="json"), **model.made_from}, wanted, rounding=False)
            return model.to(device)
        state = _State.fresh(config, real.image_shape, real.num_classes, seed, torch.device(device))
        checkpoint = folder / "checkpoint.safetensors"
        if checkpoint.exists():
            state.restore(checkpoint, wanted)
        _fit(state, real, config, seed, checkpoint, checkpoint_every, wanted, progress)
        model = Diffusion(state.ema, config, real.image_shape, tuple(real.class_names), made_from)
        model.save(folder)
        checkpoint.unlink(missing_ok=True)
    return model.to(device)


def provenance(real: Source, seed: int, device: torch.device | str) -> dict[str, Any]:
    """What the result depends on besides its settings; compared when a training is resumed."""
    return {
        "source": real.name,
        "fingerprint": real.fingerprint,
        "rows": len(real),
        "seed": seed,
        "puma": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.device(device).type,
        "processor": processor(torch.device(device)),
        "threads": torch.get_num_threads(),
    }


def _fit(
    state: _State,
    real: Source,
    config: DiffusionConfig,
    seed: int,
    checkpoint: Path,
    every: int,
    wanted: dict[str, Any],
    progress: bool,
) -> None:
    """Take the steps that are left; checkpoint on the way."""
    batches = _Batches(real, config, seed, state.device)
    with Progress("training the diffusion model", config.steps, "steps", show=progress, done=state.step) as bar:
        while state.step < config.steps:
            value = _step(state, batches, config, seed)
            state.step += 1
            if state.step % every == 0 and state.step < config.steps:
                state.save(checkpoint, wanted)
            bar.advance(note=f"loss {value:.3f}")


def _step(state: _State, batches: _Batches, config: DiffusionConfig, seed: int) -> float:
    generator = torch.Generator(state.device).manual_seed(torch_seed(seed, Stream.STEP, state.step, 1))
    images, labels = batches.draw(state.step)
    dropped = torch.rand(len(labels), generator=generator, device=state.device) < config.label_dropout
    labels = torch.where(dropped, batches.no_label, labels)
    told = None
    if config.augments:
        images, told = augment(images, generator, shift=config.shift, flip=config.flip, warp=config.warp)
    sigma = draw_sigma(len(images), config.noise_mean, config.noise_std, generator)
    noise = torch.randn(images.shape, generator=generator, device=state.device)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    # Dropout reads torch's global generator: lend it this step's seed, and give it back as it was.
    cards = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards, enabled=config.dropout > 0):
        if config.dropout > 0:
            torch.manual_seed(torch_seed(seed, Stream.STEP, state.step, 2))
        value = loss(state.denoiser, images, labels, sigma, noise, told).mean()
    torch.autograd.backward(value)
    number = float(value.detach())
    if not np.isfinite(number):
        raise CheckError(
            f"the diffusion loss is {number} at step {state.step}",
            why="training diverged; nothing of this step was kept",
            fix="lower learning_rate, or lengthen warmup",
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state.ema, state.denoiser, config.ema, state.step)
    return number


def learning_rate(config: DiffusionConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    return config.learning_rate * warm * 0.5 * (1 + float(np.cos(np.pi * step / config.steps)))


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the model; the decay ramps up as (1 + t) / (10 + t), so early weights are forgotten."""
    ramped = min(decay, (1 + step) / (10 + step))
    blend = torch.optim.swa_utils.get_ema_multi_avg_fn(ramped)  # type: ignore[no-untyped-call]
    blend(list(average.parameters()), list(model.parameters()), torch.tensor(step))


class _Batches:
    """Batches drawn with replacement, each a function of (seed, step); small sources are held in memory."""

    def __init__(self, real: Source, config: DiffusionConfig, seed: int, device: torch.device) -> None:
        self.real, self.size, self.seed, self.device = real, config.batch_size, seed, device
        self.no_label = torch.tensor(real.num_classes, device=device)
        small = len(real) * int(np.prod(real.image_shape)) <= _IN_MEMORY
        self._held: NDArray[np.uint8] | None = real.read(slice(None)) if small else None

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 [B, C, H, W] in [-1, 1] and labels int64 [B] of one step."""
        random = counter_generator(self.seed, Stream.STEP, step)
        rows = np.sort(random.integers(len(self.real), size=self.size))
        pixels = self.real.read(rows) if self._held is None else self._held[rows]
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images.contiguous(), torch.from_numpy(self.real.labels[rows]).to(self.device)


class _State:
    """Everything that changes during training."""

    def __init__(self, denoiser: Denoiser, config: DiffusionConfig, device: torch.device) -> None:
        self.device = device
        self.denoiser = denoiser.to(device).train()
        self.ema = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        if config.compile and device.type == "cuda":
            self.denoiser.network.compile()
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=config.learning_rate, fused=True)
        self.step = 0

    @classmethod
    def fresh(
        cls, config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int, seed: int, device: torch.device
    ) -> _State:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, Stream.INIT))
            denoiser = build_denoiser(config, shape, num_classes)
        return cls(denoiser, config, device)

    def save(self, path: Path, wanted: dict[str, Any]) -> None:
        tensors = {f"model/{name}": tensor for name, tensor in self.denoiser.state_dict().items()}
        tensors |= {f"ema/{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{number}/{name}": tensor for name, tensor in moments.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_safetensors(tensors, path, {"step": str(self.step), "wanted": json.dumps(wanted)})

    def restore(self, path: Path, wanted: dict[str, Any]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {path}", why=str(error), fix="delete it: training starts anew") from None
        _same(path, json.loads(metadata["wanted"]), wanted)
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            if kind == "adam":
                number, moment = rest.split("/")
                moments.setdefault(int(number), {})[moment] = tensor
            else:
                groups[kind][rest] = tensor
        self.denoiser.load_state_dict(groups["model"])
        self.ema.load_state_dict(groups["ema"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        for weight, kept in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                # The fused optimiser walks memory: moments must lie as their weight does (channels last).
                kept[name] = torch.empty_like(weight).copy_(kept[name])
        self.step = int(metadata["step"])


def _same(where: Path, found: dict[str, Any], wanted: dict[str, Any], *, rounding: bool = True) -> None:
    """Refuse to go on with what was made otherwise; warn where only the rounding differs."""
    told = [line for name in _DECIDES for line in differences(found.get(name), wanted[name], name)]
    if told:
        raise ResumeError(
            f"{where} was made otherwise",
            why="; ".join(told),
            fix="give another output path, or delete that folder to start anew",
        )
    known = [name for name in _ROUNDS if name in found]  # an earlier version may have recorded less
    told = [line for name in known for line in differences(found[name], wanted[name], name)]
    if told and rounding:
        _log.warning("%s: %s; the result will not be bit for bit that of one uninterrupted run", where, "; ".join(told))
