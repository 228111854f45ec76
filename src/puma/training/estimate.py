"""Memory and time of a training on this machine, estimated before step 0, and the micro-batch that fits."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from puma.devices import PROCESSES_PER_GPU, Devices
from puma.errors import UsageError
from puma.models.modes import batchnorm_layers
from puma.training.recipe import Recipe

_SHARE = 0.8  # of the free memory that a training may plan with
_SLACK = 1.3  # gradients and work space beside what autograd keeps, measured on WRN and PreActResNet
_MOST_DAYS = 30.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """What a training will need; memory in bytes, time in seconds.

    Args:
        steps: optimiser steps.
        batch: images a step in this process.
        micro_batch: images of one forward pass; less than ``batch`` where the whole batch does not fit.
        memory: at the peak of a step, with ``micro_batch``.
        free: memory that is free on the device.
        step_seconds: one step.
    """

    steps: int
    batch: int
    micro_batch: int
    memory: int
    free: int
    step_seconds: float

    @property
    def days(self) -> float:
        """Of the whole training."""
        return self.steps * self.step_seconds / 86400

    def __str__(self) -> str:
        hours = self.days * 24
        span = f"{self.days:,.0f} days" if hours > 72 else f"{hours:.1f} h" if hours > 2 else f"{hours * 60:.1f} min"
        passes = "" if self.micro_batch == self.batch else f" in micro-batches of {self.micro_batch}"
        return (
            f"about {span} for {self.steps:,} steps of {self.batch} images{passes} ({self.step_seconds:.2g} s each), "
            f"and {self.memory / _GIB:.2g} of {self.free / _GIB:.3g} GiB of free memory"
        )

    def require_feasible(self) -> None:
        """Refuse what this machine cannot do.

        Raises:
            UsageError: more memory than is free, or more than 30 days.
        """
        if self.memory > self.free:
            raise UsageError(
                f"one step needs about {self.memory / _GIB:.2g} GiB, {self.free / _GIB:.2g} GiB are free",
                fix="--set batch_size=..., a smaller model, another --device; --yes tries all the same",
            )
        if self.days > _MOST_DAYS:
            raise UsageError(
                f"this training would take about {self.days:,.0f} days here",
                why=f"{self.steps:,} steps of {self.batch} images, {self.step_seconds:,.3g} s each",
                fix="a GPU (--device cuda), a smaller model, or fewer steps (--set steps=...); --yes goes on",
            )


def estimate(network: nn.Module, images: Tensor, recipe: Recipe, devices: Devices) -> Estimate:
    """Measure forward passes of a few images and scale them up.

    Args:
        network: on its device; its mode is restored, its weights and buffers are not changed.
        images: a few images, float ``[b, C, H, W]`` in [0, 1], on the device.
        recipe: batch size, steps, objective, attack.
        devices: the processes that train together.
    """
    batch = recipe.batch_size // devices.world_size
    training = [module for module in network.modules() if module.training]
    network.eval()
    with devices.autocast():
        kept = _kept_bytes(network, images[:2]) / len(images[:2])
        seconds = _seconds_per_image(network, images, batch)
    for module in training:
        module.training = True
    attack = recipe.attack_steps * 2
    passes = attack + 3 if recipe.objective == "pgd-at" else attack + 7
    weights = sum(parameter.nbytes for parameter in network.parameters())
    fixed = weights * (5 if recipe.awp else 4) + 8 * batch * images[0].nbytes  # weights, gradients, momentum, EMA
    graphs = 1 if recipe.objective == "pgd-at" else 2  # clean and adversarial pass, or clean pass and attack
    each = graphs * kept * _SLACK
    free = free_memory(devices.device) // (devices.world_size if devices.device.type == "cpu" else 1)
    micro = recipe.micro_batch or batch
    while not recipe.micro_batch and micro % 2 == 0 and fixed + micro * each > _SHARE * free:
        micro //= 2
    return Estimate(recipe.steps, batch, micro, int(fixed + micro * each), int(free), seconds * passes * batch)


def batch_statistics_warning(network: nn.Module, micro: int, batch: int) -> str:
    """A sentence for the log where a batch is split; it changes the result where layers look at the whole batch."""
    split = f"batches of {batch} are split into micro-batches of {micro}"
    if batchnorm_layers(network):
        return f"{split}: batch normalisation uses the statistics of {micro} images, which changes the result"
    return f"{split}; the gradients are the same"


def free_memory(device: torch.device) -> int:
    """Bytes free on a device: at most this process's share of a GPU; for a CPU within its container's limits."""
    if device.type == "cuda":
        unused, total = torch.cuda.mem_get_info(device)
        return int(min(unused, total // int(os.environ.get(PROCESSES_PER_GPU, "1"))))
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdecimal():
        free.append(max(int(limit[0]) - int(used[0]), 0))
    return min(free)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = network(images.clone().requires_grad_())
    del logits
    return sum(kept.values())


@torch.no_grad()
def _seconds_per_image(network: nn.Module, images: Tensor, batch: int) -> float:
    """Of a forward pass, with as many images as take long enough to be measured."""
    count = min(len(images), batch)
    while True:
        many = images[:1].expand(count, *images.shape[1:]).contiguous()
        if images.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        network(many)
        if images.is_cuda:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
        if elapsed > 0.02 or count * 4 > batch:
            return elapsed / count
        count *= 4
