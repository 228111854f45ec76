"""Where training runs: one process, or one of several that torchrun started. Only this module knows Lightning Fabric.

The network that is attacked is the bare module: an attack through a wrapper would broadcast buffers at every step.
Only the forward pass that is differentiated for the optimiser goes through the wrapper, in one call for both batches.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import uuid
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from puma.errors import UsageError

log = logging.getLogger("puma")


class Devices:
    """This process's place among those that train together.

    Args:
        precision: ``"float32"``, or ``"bf16"`` for autocast.
        accelerator: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    The number of processes comes from torchrun's environment; without it there is one. `rank` and `world` say which
    this is; `device` is where its tensors live.

    Raises:
        UsageError: an accelerator that is not there.
    """

    def __init__(self, precision: str = "float32", accelerator: str = "auto") -> None:
        from lightning_fabric import Fabric

        if accelerator not in {"auto", "cpu", "cuda"}:
            raise UsageError(f"unknown accelerator {accelerator!r}", fix="auto, cpu or cuda")
        if accelerator == "cuda" and not torch.cuda.is_available():
            raise UsageError("there is no CUDA device here", fix="--accelerator cpu")
        kind = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it tells every choice of ours otherwise
        world = started_processes()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world > 1 else 1
        self._fabric = Fabric(
            accelerator=kind,
            devices=local,
            num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
            precision="bf16-mixed" if precision == "bf16" else "32-true",
        )
        if world > 1:
            self._fabric.launch()
            atexit.register(_leave)
        self.rank: int = self._fabric.global_rank
        self.world: int = self._fabric.world_size
        self.device: torch.device = self._fabric.device

    @property
    def leads(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0

    def place(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap a network that is on `device` already, and its optimiser."""
        wrapped: tuple[Any, Any] = self._fabric.setup(model, optimizer, move_to_device=False)
        return wrapped

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, averaged over the processes."""
        self._fabric.backward(loss)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the wrapped network, for calls of the bare one."""
        context: AbstractContextManager[Any] = self._fabric.autocast()
        return context

    def barrier(self) -> None:
        """Wait for all processes."""
        self._fabric.barrier()

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world == 1:
            return value
        summed = self._fabric.all_reduce(value, reduce_op="sum")
        return cast(Tensor, summed)

    def any(self, flag: bool) -> bool:
        """True if it is true in any process."""
        return bool(self.total(torch.tensor(float(flag), device=self.device)) > 0)

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: batch statistics are each process's own until then."""
        if self.world > 1:
            for buffer in model.buffers():
                buffer.copy_(self._fabric.broadcast(buffer, src=0))


def processor(device: torch.device) -> str:
    """A GPU's name, or the widest vector instructions that torch uses on this CPU.

    Kernels differ with it, and with them the last bits of a result: what can be resumed records it.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def _leave() -> None:
    """Leave the group of processes in good order; without this some end with an error after their work is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_processes(count: int, arguments: list[str]) -> int:
    """Run ``python ARGUMENTS`` as ``count`` processes of this machine, as torchrun does; return the exit code.

    Where one of them dies, the others are ended too.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code < 0:
                log.error("process %d was ended by signal %d; the same command goes on from what is kept", rank, -code)
        return next((code for code in codes.values() if code > 0), 1)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def started_processes() -> int:
    """How many processes torchrun started together (1 without torchrun)."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
