"""Margins: PUMA's modes against foolbox, adv-lib, torchattacks, ART and FAB. Quality is printed beside speed.

    make peers
    python benchmarks/margins.py ../shared/data/cifar10                    # compare with the stored baseline
    python benchmarks/margins.py ../shared/data/cifar10 --store            # and make it the baseline

One thread, CPU time, methods interleaved chunk by chunk, so that a busy machine hits all alike. Each gets the batch
that suits it: PUMA searches 512 images together, as ``puma score`` does (64 at a time pass through the network); the
others, which work on a batch until its last image is done, get 64 (32 for ResNet-18; ``--batch`` tries another). Only
images that the model classifies correctly take part (for the others most peers return at once). ``unit`` is one forward
and one backward pass to the input, measured in the same run;
``forwards`` and ``backwards`` are passes an image. Crossings are counted by a separate float32 pass of the model.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from robust_cnn import load_robust_cnn
from scipy.stats import spearmanr
from torch import Tensor, nn

import puma
from puma.attacks.deepfool import MODES
from puma.data.pool import read_batch

BASELINE = Path(__file__).with_name("margins_baseline.json")
POOL = 512


@dataclass
class Result:
    """One method on one model in one norm."""

    seconds: list[float] = field(default_factory=list)
    margins: list[Tensor] = field(default_factory=list)
    crossed: list[Tensor] = field(default_factory=list)
    passes: list[tuple[int, int]] = field(default_factory=list)


def resnet18() -> nn.Module:
    """The CIFAR-10 ResNet-18 in pyautoattack's examples (standard training)."""
    from pyautoattack import examples

    folder = Path(next(iter(examples.__path__)))
    sys.path.insert(0, str(folder))
    from resnet import ResNet18

    model: nn.Module = ResNet18()
    model.load_state_dict(torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True))
    return model.eval()


def correct_images(model: nn.Module, folder: Path, side: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` test images that the model gets right, drawn with a seed."""
    source = puma.load_dataset(f"{folder}/test-*.parquet" + (f"?resize={side}" if side != 32 else ""))
    rows = np.sort(np.random.default_rng(seed).choice(len(source), min(len(source), 4 * count), replace=False))
    images, labels = read_batch(source, rows)
    with torch.no_grad():
        right = torch.cat([model(part) for part in images.split(256)]).argmax(1) == labels
    return images[right][:count].contiguous(), labels[right][:count]


def unit_pass(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """One forward and one backward pass to the input."""
    x = images.clone().contiguous(memory_format=torch.channels_last).requires_grad_(True)
    torch.autograd.grad(model(x).gather(1, labels.unsqueeze(1)).sum(), x)
    return images


def processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def length(difference: Tensor, norm: str) -> Tensor:
    flat = difference.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def methods(norm: str, wanted: list[str]) -> dict[str, Callable[..., Any]]:
    """Every method by name; PUMA's return a `DeepFool`, the peers adversarial images."""
    table: dict[str, Callable[..., Any]] = {"unit": unit_pass}
    for mode in MODES:
        table[f"puma {mode}"] = lambda m, x, y, mode=mode: puma.deepfool(m, x, y, norm=norm, mode=mode)
    for name, build in peers.PEERS.items():
        try:
            table[name] = build(norm)
        except ImportError as error:
            print(f"  left out: {name} ({error})")
    return {name: method for name, method in table.items() if name == "unit" or not wanted or name in wanted}


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, chunk: int, wanted: list[str], rounds: int
) -> dict[str, Result]:
    """Run every method on every chunk, taking turns; after the first round only for the time it takes."""
    table = methods(norm, wanted)
    results = {name: Result() for name in table}
    for method in table.values():  # warm up allocators and kernels
        method(model, images[:2], labels[:2])
    starts = range(0, len(images), chunk)
    for turn, start in ((turn, start) for turn in range(rounds) for start in starts):
        for name, method in table.items():
            first, size = (start // POOL * POOL, POOL) if name.startswith("puma") else (start, chunk)
            x, y = images[first : first + size], labels[first : first + size]
            began = time.process_time()
            found = method(model, x, y)
            results[name].seconds.append((time.process_time() - began) / len(x))
            model.zero_grad(set_to_none=True)
            if name == "unit" or turn or first != start:
                continue
            adversarial = found if isinstance(found, Tensor) else found.adversarial
            if not isinstance(found, Tensor):
                results[name].passes.append(found.passes)
            margin = length(adversarial.detach() - x, norm) if isinstance(found, Tensor) else found.margin
            with torch.no_grad():
                results[name].crossed.append(model(adversarial.detach()).argmax(1) != y)
            results[name].margins.append(margin)
    return results


def summary(results: dict[str, Result], chunks: int) -> dict[str, dict[str, float]]:
    """Speed and quality of every method, the latter against foolbox and against the tightest known."""
    margins = {name: torch.cat(result.margins).numpy() for name, result in results.items() if name != "unit"}
    crossed = {name: torch.cat(result.crossed).numpy() for name, result in results.items() if name != "unit"}
    seconds = {name: float(np.median(result.seconds)) for name, result in results.items()}
    reference = next((name for name in ("foolbox", "adv-lib") if name in margins), "puma deepfool")
    known = [np.where(crossed[name], margins[name], np.inf) for name in margins if name != "puma fast"]
    tightest = np.minimum.reduce(known) if known else None
    table = {}
    for name, values in margins.items():
        row = {"images_per_s": 1 / seconds[name], "units": seconds[name] / seconds["unit"]}
        row |= {f"times_{peer}": seconds[peer] / seconds[name] for peer in peers.PEERS if peer in seconds}
        both = (crossed[name] & crossed[reference]) if name != "puma fast" else crossed[reference]
        if name != "puma fast":
            row["crossed"] = float(crossed[name].mean())
        ratio = values[both] / margins[reference][both]
        row |= {"median": float(np.median(ratio)), "mean": float(values[both].mean() / margins[reference][both].mean())}
        row |= {"p99": float(np.quantile(ratio, 0.99)), "median_margin": float(np.median(values[both]))}
        if passes := results[name].passes:
            row |= {
                "forwards": sum(f for f, _ in passes) / len(values),
                "backwards": sum(b for _, b in passes) / len(values),
            }
        if tightest is not None:
            top = max(1, int(0.3 * len(values)))
            row["spearman"] = float(spearmanr(values, tightest).statistic)
            row["top30"] = len(set(np.argsort(-values)[:top]) & set(np.argsort(-tightest)[:top])) / top
        table[name] = row
    table["unit"] = {"images_per_s": 1 / seconds["unit"], "units": 1.0}
    return table


def show(title: str, table: dict[str, dict[str, float]]) -> None:
    """Print one model and norm."""
    columns = {
        "images_per_s": "images/s",
        "units": "units",
        "forwards": "forwards",
        "backwards": "backwards",
        "times_foolbox": "x foolbox",
        "times_adv-lib": "x adv-lib",
        "times_adv-lib SuperDeepFool": "x SDF",
        "median": "median",
        "mean": "mean",
        "p99": "p99",
        "crossed": "crossed",
        "median_margin": "margin",
        "spearman": "spearman",
        "top30": "top30",
    }
    print(f"\n{title}\n{'':24}" + "".join(f"{head:>10}" for head in columns.values()))
    for name, row in table.items():
        if name == "images":
            continue
        cells = (f"{row[key]:10.3f}" if key in row else f"{'-':>10}" for key in columns)
        print(f"{name:24}" + "".join(cells), flush=True)


def compare(table: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Where PUMA needs over 20 % more units than the stored baseline."""
    worse = []
    for case, rows in table.items():
        for name, row in rows.items():
            before = stored.get(case, {}).get(name)
            if name.startswith("puma") and before and row["units"] > 1.2 * before["units"]:
                worse.append(f"{case}, {name}: {row['units']:.2f} units, {before['units']:.2f} before")
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path, help="folder with test-*.parquet")
    parser.add_argument("--images", type=int, nargs=2, default=(512, 64), help="for the robust CNN, for ResNet-18")
    parser.add_argument("--models", nargs="*", default=["robust", "resnet18"])
    parser.add_argument("--norms", nargs="*", default=["Linf", "L2"])
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    parser.add_argument("--batch", type=int, help="images that the others get together")
    parser.add_argument("--rounds", type=int, default=1, help="time every chunk so often; the median is taken")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--store", action="store_true", help="write the baseline")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.cifar10.is_dir():
        print(f"{options.cifar10} is absent: nothing to measure on")
        return
    cases = {"robust": (load_robust_cnn, 16, options.images[0], 64), "resnet18": (resnet18, 32, options.images[1], 32)}
    tables: dict[str, Any] = {}
    for name in options.models:
        build, side, count, chunk = cases[name]
        model, chunk = build(), options.batch or chunk
        images, labels = correct_images(model, options.cifar10, side, count, options.seed)
        for norm in options.norms:
            results = measure(model, images, labels, norm, chunk, options.methods, options.rounds)
            tables[f"{name} {norm}"] = summary(results, chunk)
            tables[f"{name} {norm}"]["images"] = {
                "count": len(images),
                "chunk": chunk,
                "seed": options.seed,
                "rounds": options.rounds,
            }
            show(f"{name}, {norm}, {len(images)} correct images, chunks of {chunk}", tables[f"{name} {norm}"])
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "peers": peers.versions(),
        "puma": puma.__version__,
    }
    stored = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"tables": {}}
    if options.store:
        stored["environment"] = record
        stored["tables"] |= tables
        BASELINE.write_text(json.dumps(stored, indent=1) + "\n")
    else:
        worse = compare(tables, stored["tables"])
        print("\n".join(["", *(worse or ["no mode needs over 20 % more units than the stored baseline"])]))
        sys.exit(bool(worse))


if __name__ == "__main__":
    main()
