"""A CUDA device that is none: tensors that say `cuda:0` and refuse what a real one refuses, computed on the CPU.

    python tests/benchmarks/pretend_cuda.py FOLDER SCRIPT ARGUMENTS...

runs a script with it (FOLDER is for a library of few lines that tells torch of the device). As on a GPU, operations on
tensors of two devices, `numpy()` of the device's tensors and generators of the wrong device raise; copies between the
two and values read on the host count as synchronisation, which `torch.cuda.set_sync_debug_mode` makes an error or a
warning. What kernels compute, how fast, and compiling are not pretended: `torch.compile` returns its model.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import importlib.util
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # before torch asks for the first time whether there is a device
    library = Path(sys.argv[1]) / "pretend_cuda.so"
    if not library.exists():
        torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
        source, libraries = Path(__file__).with_suffix(".cpp"), torch_folder / "lib"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(source)]
        command += ["-o", str(library), f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
    ctypes.CDLL(str(library))

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
MIXED |= {aten.index_put.default, aten._index_put_impl_.default, aten.set_.source_Tensor}
READ = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
READ |= {aten._unique2.default, aten.repeat_interleave.Tensor, aten.is_nonzero.default}
STATE = SimpleNamespace(sync="default", waits=0, tensors=0)


class OnGpu(torch.Tensor):
    """A tensor of the device; ``inner`` holds its values."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> OnGpu:
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), device="cuda:0", requires_grad=requires_grad, **shape
        )
        made.inner = inner
        STATE.tensors += 1
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"


def synchronised(function: Any) -> None:
    STATE.waits += 1
    if STATE.sync == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {function}")
    if STATE.sync == "warn":
        warnings.warn(f"called a synchronizing CUDA operation: {function}", stacklevel=2)


def on_device(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    gpu, asked = len(here) < len(tensors), kwargs.get("device")
    target = gpu if asked is None else torch.device(asked).type == "cuda"
    if gpu and function not in MIXED and any(tensor.ndim for tensor in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {function}")
    for generator in (value for value in flat if isinstance(value, torch.Generator)):
        if (getattr(generator, "place", "cpu") == "cuda") != target:
            raise RuntimeError(f"Expected a generator of the tensor's device: {function}")
    mask = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in (args[1] if _indexes(function) else ()))
    across = function in (aten.copy_.default, aten._to_copy.default) and (gpu != target or (gpu and bool(here)))
    waits = across and not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if waits or (gpu and (function in READ or mask or (_indexes(function) and any(t.ndim for t in here)))):
        synchronised(function)
    inner = tree_map(lambda value: value.inner if isinstance(value, OnGpu) else value, (args, kwargs))
    if asked is not None:
        inner[1]["device"] = torch.device("cpu")
        inner[1].pop("pin_memory", None)
    result = function(*inner[0], **inner[1])
    if across and result is not None and not function._schema.is_mutable:
        result = result.clone() if any(result is t for t in tree_flatten(inner)[0]) else result
    if not target:
        return result
    wrapped = tree_map(lambda value: OnGpu(value) if isinstance(value, torch.Tensor) else value, result)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if gpu else wrapped


def _indexes(function: Any) -> bool:
    return function in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Pretended(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is aten._pin_memory.default:
            return args[0].clone()
        if function is aten.is_pinned.default:
            return False
        return on_device(function, args, kwargs or {})


class Generator(torch.Generator):
    place: str

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device).type
        return made


def pretend() -> None:
    """From here on there is a CUDA device."""
    cuda: Any = torch.cuda
    gib = 1 << 30
    properties = SimpleNamespace(name="pretended", total_memory=80 * gib, major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Any] = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0}
    answers |= {"is_bf16_supported": True, "get_device_properties": properties, "get_device_name": "pretended"}
    answers |= {"get_device_capability": (9, 0), "mem_get_info": (70 * gib, 80 * gib), "max_memory_allocated": gib}
    answers |= dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_device"))
    answers |= dict.fromkeys(("manual_seed_all", "manual_seed", "set_rng_state"))
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.random.manual_seed = cuda.manual_seed
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.set_sync_debug_mode = lambda mode: setattr(STATE, "sync", mode)
    torch.Generator = Generator  # type: ignore[misc]
    torch.compile = lambda model, **_: model  # type: ignore[assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # set_data would lose the class of the tensor
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") as a copy that modes see
    Pretended().__enter__()
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def with_device(self: Any, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with Pretended() if torch._C._len_torch_dispatch_stack() == 0 else contextlib.nullcontext():
                return work(*args, **kwargs)

        return submit(self, run)

    concurrent.futures.ThreadPoolExecutor.submit = with_device  # type: ignore[method-assign]


if __name__ == "__main__":
    pretend()
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
