"""Margins on a GPU: images per second, share of the matmul peak, and what 50 million images would take.

    python benchmarks/margins_gpu.py                               # PreActResNet-18 and WRN-28-10, 32x32, every option
    python benchmarks/margins_gpu.py --models wrn-28-10 --run runs/wrn --data cifar10-test.parquet   # a trained one
    python benchmarks/margins_gpu.py --device cpu --images 8 --models small-cnn                      # does it run?

Without ``--run`` the network is as it was initialised and the images are noise: the passes are those of a network, but
how many of them an image takes is not what a trained one takes. The JSON says which it was. The work of a pass is
counted with `torch.utils.flop_counter`; a backward pass to the input is counted as one forward pass.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import puma
from puma.data.tensors import read_batch

MANY = 50_000_000


def clock(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices, the fastest of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        began = clock(device)
        a @ a
        seconds.append(clock(device) - began)
    return 2 * size**3 / min(seconds[1:])


def inputs(options: argparse.Namespace, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and the labels that the model gives them: all of them are searched."""
    if options.data:
        source = puma.load_dataset(options.data)
        images = read_batch(source, range(min(options.images, len(source))))[0].to(device)
    else:
        images = torch.rand(options.images, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        return images, torch.cat([model(part) for part in images.split(256)]).argmax(1)


def measure(model: nn.Module, images: Tensor, labels: Tensor, chunk: int, **search: Any) -> dict[str, float]:
    """Time one batch, after one that warms up and compiles."""
    device = images.device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images[:1])
    puma.deepfool(model, images, labels, chunk=chunk, **search)
    began = clock(device)
    hit = puma.deepfool(model, images, labels, chunk=chunk, **search)
    seconds = clock(device) - began
    forwards, backwards = (count / len(images) for count in hit.passes)
    return {
        "images_per_s": len(images) / seconds,
        "forwards": forwards,
        "backwards": backwards,
        "crossed": float((hit.status == "crossed").mean()),
        "flop_per_s": counter.get_total_flops() * (forwards + backwards) * len(images) / seconds,
        "hours_for_50_million": MANY / (len(images) / seconds) / 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["preactresnet-18", "wrn-28-10"])
    parser.add_argument("--run", type=Path, help="run folder: its last model instead of a fresh one")
    parser.add_argument("--data", help="source of images; without it, noise")
    parser.add_argument("--modes", nargs="+", default=["fast", "refined"])
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here: nothing to measure on")
        return
    size = 8192 if device.type == "cuda" else 512
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "puma": puma.__version__,
        "trained": bool(options.run),
        "peak_flop_per_s": {
            "float32": peak(device, torch.float32, size),
            "bf16": peak(device, torch.bfloat16, size),
        },
        "rows": [],
    }
    for name in options.models:
        built = puma.load_model(options.run) if options.run else puma.build_model(name, 10, seed=0)
        model = built.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        images, labels = inputs(options, model, device)
        compiled = torch.compile(model, dynamic=False)
        for mode in options.modes:
            for precision in ("float32", "bf16"):
                for proxy in (None, compiled):
                    row = {"model": name, "mode": mode, "precision": precision, "compiled": proxy is not None}
                    search = {"mode": mode, "norm": options.norm, "precision": precision, "proxy": proxy}
                    row |= measure(model, images, labels, options.chunk, **search)
                    row["share_of_peak"] = row["flop_per_s"] / record["peak_flop_per_s"][precision]
                    record["rows"].append(row)
                    shown = (
                        "images_per_s",
                        "forwards",
                        "backwards",
                        "crossed",
                        "share_of_peak",
                        "hours_for_50_million",
                    )
                    print(f"{name:16} {mode:7} {precision:8} {'compiled' if row['compiled'] else '':9}", end="")
                    print("  ".join(f"{key} {row[key]:.4g}" for key in shown), flush=True)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
