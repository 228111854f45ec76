"""Which device computes, and the place of this process among those that train one network together."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from puma import __version__
from puma.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger("puma")
VISIBLE_GPUS, PROCESSES_PER_GPU = "CUDA_VISIBLE_DEVICES", "PUMA_PROCESSES_PER_GPU"


def resolve_device(name: str = "auto", local: int = 0) -> torch.device:
    """The device called ``name`` (else `UsageError`); ``auto`` is a GPU if there is one, ``local`` says which."""
    import torch

    count = torch.cuda.device_count()
    if name in ("auto", "cuda") and count:
        name = f"cuda:{local % count}" if count > 1 else "cuda"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"unknown device {name!r}", fix="auto, cpu, cuda or cuda:N")
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"there is no device {name!r} here", why=f"{count} GPUs are visible", fix="--device cpu")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on besides its settings: recorded by whatever can be resumed."""
    import torch

    on_gpu, cpu = device.type == "cuda", torch.backends.cpu.get_cpu_capability()  # widest vectors: kernels differ
    return {
        "puma": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def warn_slow_bf16(precision: str, device: torch.device) -> None:
    """Log a warning where bfloat16 is asked for on a CPU that has no instructions for it, before hours are spent."""
    import torch

    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bf16" and device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not has_bf16:
        log.warning("this CPU has no bfloat16 instructions: bf16 is several times slower here; use float32, or a GPU")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them: numbers, UUIDs."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(VISIBLE_GPUS, "").split(",") if name.strip()]
    return named[:count] or [str(number) for number in range(count)]


def world_size() -> int:
    """How many processes train together: torchrun's number, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


class Devices:
    """This process's place (``rank`` of ``world_size``) among those that train one network, and its ``device``.

    Only this class knows Lightning Fabric. The network that is attacked is the bare module: an attack through the
    wrapper would broadcast buffers at every step. ``precision`` is ``"float32"`` or ``"bf16"`` (autocast).
    """

    def __init__(self, precision: str = "float32", device: str = "auto") -> None:
        import torch
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

        size = world_size()
        chosen = resolve_device(device)
        warn_slow_bf16(precision, chosen)
        if size > 1 and ":" in device:
            raise UsageError(f"{size} processes cannot all use {device}", fix="--device cuda: each takes a GPU")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size > 1 else 1
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # otherwise it logs every choice of ours
        self._fabric = Fabric(
            accelerator=chosen.type,
            devices=[chosen.index or 0] if chosen.type == "cuda" and size == 1 else local,
            num_nodes=size // local,
            strategy="ddp" if size > 1 else "auto",
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            # not what Fabric finds: a process alone, started by srun or mpirun, is no rank of a training
            plugins=TorchElasticEnvironment() if size > 1 else LightningEnvironment(),
        )
        if size > 1:
            self._fabric.launch()
            group = torch.distributed  # some processes would end with an error after their work is done
            atexit.register(lambda: group.is_initialized() and group.destroy_process_group())
        self.rank: int = self._fabric.global_rank
        self.is_rank_zero = self.rank == 0  # it alone writes files
        self.world_size: int = self._fabric.world_size
        self.device: torch.device = self._fabric.device
        self.backward = self._fabric.backward  # gradients are averaged over the processes
        self.autocast = self._fabric.autocast  # the precision of the wrapped network, for calls of the bare one
        self.barrier = self._fabric.barrier

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap a network that is on `device` already, and its optimiser."""
        return cast("tuple[Any, Any]", self._fabric.setup(model, optimizer, move_to_device=False))

    def no_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Backward passes inside keep their gradients to themselves, if ``enabled``: others of the step follow."""
        return self._fabric.no_backward_sync(cast(Any, model), enabled=enabled)

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        return value if self.world_size == 1 else cast("Tensor", self._fabric.all_reduce(value, reduce_op="sum"))

    def any(self, flag: bool) -> bool:
        """True if it is true in any process."""
        import torch

        return flag if self.world_size == 1 else bool(self.all_reduce(torch.tensor(int(flag), device=self.device)) > 0)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: batch statistics are each process's own until then."""
        import torch

        with torch.no_grad():
            for buffer in model.buffers() if self.world_size > 1 else ():
                buffer.copy_(self._fabric.broadcast(buffer, src=0))
