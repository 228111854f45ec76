"""Samples per second of one TRADES-10 step: PUMA against a plain loop in the structure of the published code.

    OMP_NUM_THREADS=1 python benchmarks/training.py [--models small-cnn ...] [--variants bf16 ...] [--batch N]

Both train on the same images with the same network, BN mode, optimiser and average, in one process, turn by turn, so
that whatever else the machine does hits both alike. Seconds are CPU seconds of the process (with one thread, those that
a machine of its own would take), on a GPU of the clock; the figure is the median of the turns' ratios, with quartiles.

The plain loop does what github.com/wzekai99/DM-Improves-AT does, written anew: each image cropped and mirrored
by itself on the CPU through PIL, float32, NCHW, noise drawn on the CPU, a clean pass with a graph that is thrown away,
`autograd.grad` to the input with parameters that require gradients, statistics toggled module by module, an average
parameter by parameter, three `item()`.

The work of the convolutions is counted, not assumed: a forward pass is 1 forward-equivalent, a backward pass to the
input 1, to parameters too 2. Divided by the seconds and by the fastest product or convolution that the machine does,
it gives the share of the peak: a plain loop at 90 % of the float32 peak cannot be beaten by more than 1.11x in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from puma.data.pool import Pool
from puma.data.source import Source, in_memory
from puma.devices import Devices
from puma.models.networks import build_model
from puma.threat import ThreatModel
from puma.training.loop import Training, prepare
from puma.training.recipe import Recipe, load_recipe

THREAT = ThreatModel("Linf", 8 / 255)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BATCHES = {"small-cnn": 256, "preactresnet-18": 16, "wrn-28-10": 8}
# else the momentum of the first step, which is another, compiles the network twice
ONCE = {"batchnorm_first_step": False}
VARIANTS: dict[str, dict[str, object]] = {
    "float32": {"channels_last": True},
    "float32 compiled": {"channels_last": True, "compile": True, **ONCE},
    "bf16": {"channels_last": True, "precision": "bf16"},
    "bf16 compiled": {"channels_last": True, "precision": "bf16", "compile": True, **ONCE},
}


def random_pool(count: int) -> Pool:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % 10
    return Pool([Source(in_memory(images), labels, name="random", fingerprint="0" * 64)])


class PlainLoop:
    """The published structure, one step at a time."""

    def __init__(self, model: nn.Module, pool: Pool, batch_size: int) -> None:
        self.model, self.pool, self.batch_size = model.to(DEVICE).train(), pool, batch_size
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.random = np.random.default_rng(0)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = [], []
        for row in self.random.integers(len(self.pool), size=self.batch_size):
            pixels, label = self.pool[int(row)]
            image = ImageOps.expand(Image.fromarray(pixels), 4)
            top, left = self.random.integers(0, 9, 2)
            image = image.crop((left, top, left + 32, top + 32))
            if self.random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255))
            labels.append(label)
        return torch.stack(images).to(DEVICE), torch.tensor(labels).to(DEVICE)

    def step(self) -> None:
        model, (x, y), eps = self.model, self.batch(), THREAT.eps
        self._track(False)
        adversarial = (x + torch.empty(x.shape).uniform_(-eps, eps).to(DEVICE)).clamp(0, 1)
        p_natural = F.softmax(model(x), dim=1).detach()
        for _ in range(10):
            adversarial.requires_grad_()
            loss = F.kl_div(F.log_softmax(model(adversarial), dim=1), p_natural, reduction="batchmean")
            (gradient,) = torch.autograd.grad(loss, [adversarial])
            adversarial = adversarial.detach() + 2 / 255 * torch.sign(gradient.detach())
            adversarial = torch.min(torch.max(adversarial, x - eps), x + eps).clamp(0, 1)
        self._track(True)
        self.optimizer.zero_grad()
        natural, attacked = model(x), model(adversarial)
        robust = F.kl_div(F.log_softmax(attacked, 1), F.softmax(natural, 1), reduction="batchmean")
        loss = F.cross_entropy(natural, y, label_smoothing=0.1) + 5.0 * robust
        loss.backward()
        self.optimizer.step()
        for own, new in zip(self.average, model.parameters(), strict=True):
            own.data *= 0.995
            own.data += new.data * 0.005
        _ = loss.item(), (natural.argmax(1) == y).float().mean().item(), (attacked.argmax(1) == y).float().mean().item()

    def _track(self, on: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = on


class Ours:
    """The same step by `puma.training`."""

    def __init__(self, model: nn.Module, pool: Pool, recipe: Recipe) -> None:
        devices = Devices(recipe.precision)
        self.training = Training(prepare(model, pool, THREAT, None, recipe, 0, 0, devices))
        self.training.network.train()
        self.done = 0

    def step(self) -> None:
        if CUDA and self.training.recipe.compile:  # with CUDA graphs the clean pass has to outlast those of the attack
            torch.compiler.cudagraph_mark_step_begin()
        self.training.take_step(self.done)
        self.done += 1


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the work of convolutions: forward, gradient to the input, gradient to the weight, each 1."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.work += _multiplications(args[0], args[1], function(*args))
        elif function is torch.ops.aten.convolution_backward.default:
            wanted = args[10]
            self.work += (int(wanted[0]) + int(wanted[1])) * _multiplications(args[1], args[2], args[0])
        return function(*args, **(kwargs or {}))


def _multiplications(inputs: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> float:
    return float(output.numel()) * weight[0].numel()


def work_of(loop: PlainLoop | Ours, network: nn.Module, batch_size: int) -> tuple[float, float]:
    """Multiplications of one step's convolutions, and the same in forward passes of its batch."""
    with Counter() as step:
        loop.step()
    with Counter() as forward, torch.no_grad():
        network(torch.rand(batch_size, 3, 32, 32, device=DEVICE))
    return step.work, step.work / forward.work


def peak(dtype: torch.dtype) -> float:
    """Multiplications a second of the fastest of some products and convolutions, each at its best of several runs."""
    side = 8192 if CUDA else 1536
    a, b = torch.randn(2, side, side, device=DEVICE, dtype=dtype)
    rates = [side**3 / min(seconds(lambda: a @ b) for _ in range(7))]
    count = 512 if CUDA else 16
    for channels, pixels in ((160, 32), (320, 16)):
        images = torch.randn(count, channels, pixels, pixels, device=DEVICE, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=DEVICE, dtype=dtype)
        conv = conv.to(memory_format=torch.channels_last).requires_grad_(False)
        rates.append(images.numel() * channels * 9 / min(seconds(lambda: conv(images)) for _ in range(7)))  # noqa: B023 (called at once)
    return max(rates)


def seconds(work: Callable[[], object]) -> float:
    """What ``work()`` takes: CPU seconds of this process, on a GPU seconds of the clock."""
    if not CUDA:
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _recipe(batch_size: int, **changes: object) -> Recipe:
    return load_recipe("trades-edm", batch_size=batch_size, steps=100_000, **changes)


def compare(
    name: str, turns: int, variants: list[str], batch: int | None, peaks: Mapping[str, float | None]
) -> list[dict[str, object]]:
    """Measure one network, turn by turn."""
    batch_size = batch or BATCHES[name]
    pool = random_pool(max(4 * batch_size, 64))
    loops: dict[str, PlainLoop | Ours] = {"plain": PlainLoop(build_model(name, 10, **_norm(name)), pool, batch_size)}
    for variant in variants:
        loops[variant] = Ours(build_model(name, 10, **_norm(name)), pool, _recipe(batch_size, **VARIANTS[variant]))
    work = {}  # counting warms up, too
    for key, loop in loops.items():
        counted = loop
        if "compiled" in key:  # what is compiled cannot be counted, and does the same as what is not
            for _ in range(3):  # compiles; records CUDA graphs, if asked for; the third is as all that follow
                loop.step()
            recipe = _recipe(batch_size, **VARIANTS[key] | {"compile": False})
            counted = Ours(build_model(name, 10, **_norm(name)), pool, recipe)
        network = counted.model if isinstance(counted, PlainLoop) else counted.training.network
        work[key] = work_of(counted, network, batch_size)
        del counted, network  # memory that would count as the others'
    taken: dict[str, list[float]] = {key: [] for key in loops}
    memory = dict.fromkeys(loops, 0)
    for _ in range(turns):
        for key, loop in loops.items():
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            taken[key].append(seconds(loop.step))
            memory[key] = max(memory[key], torch.cuda.max_memory_allocated() if CUDA else 0)
    rows = []
    for key, values in taken.items():
        ratios = sorted(a / b for a, b in zip(taken["plain"], values, strict=True))
        done, equivalents = work[key]
        fastest = peaks["bf16" if "bf16" in key else "float32"]
        rows.append(
            {
                "model": name,
                "loop": key,
                "batch": batch_size,
                "turns": turns,
                "samples_per_second": round(batch_size / statistics.median(values), 3),
                "speedup": round(statistics.median(ratios), 3),
                "speedup_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
                "forward_equivalents": round(equivalents, 3),
                "share_of_peak": round(done / statistics.median(values) / fastest, 3) if fastest else None,
                "peak_memory_bytes": memory[key] or None,
            }
        )
    return rows


def _norm(name: str) -> dict[str, str]:
    return {"norm": "batch"} if name == "small-cnn" else {}


def _processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--variants", nargs="+", default=["float32", "bf16"], choices=list(VARIANTS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batch", type=int, help="Instead of each network's own.")
    parser.add_argument("--out", type=Path, help="JSON list that the report is added to.")
    options = parser.parse_args()
    peaks = {"float32": peak(torch.float32), "bf16": peak(torch.bfloat16)}
    report = {
        "machine": torch.cuda.get_device_name()
        if CUDA
        else f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak_gflop_per_second": {kind: round(2e-9 * rate, 1) for kind, rate in peaks.items()},
        "rows": [
            row
            for name in options.models
            for row in compare(name, options.turns, options.variants, options.batch, peaks)
        ],
    }
    print(f"{report['machine']}, torch {report['torch']}, {report['threads']} threads")
    print(f"fastest product or convolution, GFLOP/s: {report['peak_gflop_per_second']}")
    for row in report["rows"]:
        low, high = row["speedup_quartiles"]
        print(
            f"{row['model']:16} {row['loop']:17} {row['samples_per_second']:9.2f} samples/s   "
            f"{row['speedup']:.2f}x  (quartiles {low:.2f} to {high:.2f})   {row['forward_equivalents']:.2f} forward "
            f"passes a step, {row['share_of_peak']:.0%} of the peak"
        )
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.is_file() else []
        options.out.write_text(json.dumps([*before, report], indent=1) + "\n")


if __name__ == "__main__":
    main()
