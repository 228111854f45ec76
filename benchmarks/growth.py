"""Cost as it grows: CPU seconds and memory of scoring, planning and sampling against rows, of training against work.

    python benchmarks/growth.py ../shared/data/cifar10       # about 20 minutes on one core; writes JSON and picture
    python benchmarks/growth.py --kinds scoring_linear       # some points only (those scored take 18 of the 20 minutes)
    python benchmarks/growth.py --draw                       # the picture alone, from the JSON

Stopped, the same command goes on with the point it was at (the longest takes eight minutes). Everything drawn as a
point was measured at that size; nothing is extrapolated. Each point is a process of its own with
one thread: ``seconds`` are its CPU seconds (user and system, so that other work on the machine hardly counts), ``peak``
its largest resident memory during the work, ``base`` what Python, torch and the inputs held before it. Where scoring
all rows would take too long, one part of 65,536 rows is scored inside a pool of that size: that is a point of memory
and none of time.

The floors: bytes that have to be moved, at the rate at which this machine copies memory, and multiplications and
additions of the convolutions, at the rate of its fastest float32 product or convolution. The pools of up to 50 million
images are one sparse ``.npz`` of up to 154 GB, whose zeros come from memory, not from a disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from margins import processor
from plan_scale import synthetic_table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training import THREAT, Ours, PlainLoop, _norm, _recipe, peak, random_pool, work_of

import puma
from puma.data.npz import write_npz
from puma.data.pool import BatchSampler, read_batch
from puma.scoring.score import ScoringSettings

HERE = Path(__file__).parent
STORED, PICTURE = HERE / "growth.json", HERE.parent / "docs" / "images" / "growth.svg"
SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
IMAGE = 32 * 32 * 3
BATCHES, BATCH, PART = 100, 512, 65_536
NETWORKS = {"small-cnn": 64, "preactresnet-18": 16, "wrn-16-4": 16, "wrn-28-10": 4}
TABLE_ROW, PLAN_ROW = 13, 5
"""Bytes of a row: four int16, margin float32, status int8; keep bool, eps float32."""


def measured(work: Callable[[], object]) -> dict[str, float]:
    """CPU seconds and memory in bytes of ``work``."""
    base = _resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "base": base, "peak": max(_resident("VmHWM"), base)}


def _resident(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def sparse_pool(folder: Path, rows: int) -> puma.Pool:
    """``rows`` black images of 32x32 as a sparse ``.npz``, a fiftieth of them named real."""
    real = max(rows // 50, 1)
    files = [_sparse_npz(folder / f"{name}-{count}.npz", count) for name, count in (("r", real), ("s", rows - real))]
    return puma.Pool([puma.load_dataset(str(file)) for file in files])


def _sparse_npz(path: Path, rows: int) -> Path:
    """An uncompressed archive of a sparse ``image.npy`` and a ``label.npy`` (whose checksum is left 0)."""
    if path.exists():
        return path
    label = (np.arange(rows) % 10).astype(np.uint8)
    members = [("label.npy", label.shape, "|u1", label.tobytes()), ("image.npy", (rows, 32, 32, 3), "|u1", None)]
    directory = b""
    with path.open("wb") as file:
        for name, shape, kind, data in members:
            text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
            text += b" " * (-(len(text) + 11) % 64) + b"\n"
            header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
            size, offset = len(header) + int(np.prod(shape, dtype=np.int64)), file.tell()
            crc = 0 if data is None else zlib.crc32(header + data)
            fields = struct.pack("<5H3I2H", 45, 0, 0, 0, 33, crc, 2**32 - 1, 2**32 - 1, len(name), 20)
            sizes = struct.pack("<HHQQ", 1, 16, size, size)
            file.write(b"PK\x03\x04" + fields + name.encode() + sizes + header)
            if data is None:
                file.seek(size - len(header), os.SEEK_CUR)
            else:
                file.write(data)
            fields = struct.pack("<5H3I2H", 45, 0, 0, 0, 33, crc, 2**32 - 1, 2**32 - 1, len(name), 28)
            sizes = struct.pack("<HHQQQ", 1, 24, size, size, offset)
            directory += b"PK\x01\x02" + struct.pack("<H", 45) + fields
            directory += struct.pack("<3H2I", 0, 0, 0, 0, 2**32 - 1) + name.encode() + sizes
        start = file.tell()
        file.write(directory)
        end = file.tell()
        file.write(b"PK\x06\x06" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 2, 2, len(directory), start))
        file.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        file.write(b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 2, 2, len(directory), 2**32 - 1, 0))
    return path


# --- the points -----------------------------------------------------------------------------------------------------


def scoring(mode: str, rows: int, folder: Path, cifar10: str) -> dict[str, Any]:
    """The robust CNN on so many images of CIFAR-10 at 16x16, from an ``.npz``."""
    from robust_cnn import load_robust_cnn

    saved = folder / f"cifar-{rows}.npz"
    split = "test" if rows <= 10_000 else "train"
    if not saved.exists():
        source = puma.load_dataset(f"{cifar10}/{split}-*.parquet?resize=16&subset={rows}")
        write_npz(saved, [source.read(slice(None))], source.labels, class_names=source.class_names)
    model, pool = load_robust_cnn(), puma.Pool([puma.load_dataset(str(saved))])
    images, labels = read_batch(pool, np.arange(256) % len(pool))
    hit = puma.deepfool(model, images, labels, mode=mode)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images[:1])
    flops = counter.get_total_flops() * sum(hit.passes) / 256  # backward to the input: as many as forward
    pool = puma.Pool([puma.load_dataset(str(saved))])
    result = measured(lambda: puma.score_margins(model, pool, mode=mode))
    return result | {"flops": flops * rows, "passes": sum(hit.passes) / 256}


def scoring_linear(mode: str, rows: int, folder: Path, cifar10: str) -> dict[str, Any]:
    """A linear model on a sparse pool: what reading, DeepFool's own steps and the table cost without a network."""
    torch.manual_seed(0)
    model, pool = nn.Sequential(nn.Flatten(), nn.Linear(IMAGE, 10)).eval(), sparse_pool(folder, rows)
    result = measured(lambda: puma.score_margins(model, pool, mode=mode))
    return result | {"bytes": 2.0 * IMAGE * rows, "flops": 2.0 * IMAGE * 10 * 2 * rows}


def scoring_part(mode: str, rows: int, folder: Path, cifar10: str) -> dict[str, Any]:
    """The memory of one part of 65,536 rows of a large pool, opened by the process that scores it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(IMAGE, 10)).eval()
    sparse_pool(folder, rows)

    def work() -> None:
        pool = sparse_pool(folder, rows)
        start = len(pool) // 2
        part = range(start, min(start + PART, len(pool)))
        ScoringSettings(mode=mode).score_rows([model], pool, part, lambda images: None)

    result = measured(work)
    return {"part_seconds": result.pop("seconds")} | result


def planning(mode: str, rows: int, folder: Path, cifar10: str) -> dict[str, Any]:
    """A synthetic margin table in memory to a class-balanced `puma` plan."""
    table = synthetic_table(rows, 0)
    result = measured(lambda: puma.make_plan(table, "puma", 0.3, threat=THREAT, class_balanced=True))
    return result | {"bytes": float(TABLE_ROW + PLAN_ROW) * rows, "held": float(TABLE_ROW + PLAN_ROW) * rows}


def sampling(mode: str, rows: int, folder: Path, cifar10: str) -> dict[str, Any]:
    """A hundred batches of 512 from 70 % of a sparse pool, as float32 tensors, and what precedes the first."""
    keep = np.random.default_rng(0).random(rows) < 0.7
    pool, batches = sparse_pool(folder, rows), list[BatchSampler]()
    read_batch(pool, np.arange(2))
    start = measured(
        lambda: batches.append(BatchSampler(pool.synthetic, keep=keep, batch_size=BATCH, synthetic_share=0.7))
    )

    def work() -> None:
        for step in range(BATCHES):
            read_batch(pool, batches[0].indices(step))

    result = measured(work)
    seconds = start["seconds"] + result["seconds"]
    moved = 5.0 * IMAGE * BATCH * BATCHES  # uint8 read, float32 written
    return {"seconds": seconds, "first": start["seconds"], "base": start["base"]} | {
        "peak": max(start["peak"], result["peak"]),
        "bytes": moved,
        "held": 4.0 * int(keep.sum()) + 5.0 * IMAGE * BATCH,  # the kept rows as uint32, and a batch
    }


def training(network: str, rows: int, folder: Path, cifar10: str) -> dict[str, Any]:
    """One TRADES-10 step of float32 in ``rows`` images, divided by them; the median of three."""
    pool = random_pool(max(4 * rows, 64))
    model = puma.build_model(network, 10, **_norm(network))
    loop: Ours | PlainLoop = Ours(model, pool, _recipe(rows, channels_last=True))
    work, _ = work_of(loop, model, rows)
    steps = sorted((measured(loop.step) for _ in range(3)), key=lambda step: step["seconds"])
    middle = steps[1]
    return middle | {"seconds": middle["seconds"] / rows, "flops": 2 * work / rows, "batch": rows}


KINDS = {
    "scoring": scoring,
    "scoring_linear": scoring_linear,
    "scoring_part": scoring_part,
    "planning": planning,
    "sampling": sampling,
    "training": training,
}
LABELS = {
    ("scoring", "refined"): "scoring, small CNN, refined",
    ("scoring", "fast"): "scoring, small CNN, fast",
    ("scoring_linear", "fast"): "scoring, linear model, fast",
    ("scoring_part", "fast"): "scoring, one part of 65,536 rows",
    ("planning", "puma"): "planning (puma, class-balanced)",
    ("sampling", "random"): f"sampling, {BATCHES} batches of {BATCH}",
}


def points(toy: bool, cifar10: str) -> list[tuple[str, str, int]]:
    """Kind, mode or network, rows or batch."""
    if toy:
        small = [(kind, mode, 2_000) for kind, mode in LABELS if kind != "scoring"]
        return [*small, ("sampling", "random", 4_000), ("training", "small-cnn", 8)]
    images = [("scoring", "fast", 10_000), ("scoring", "fast", 50_000), ("scoring", "refined", 10_000)]
    rows = [("planning", "puma", size) for size in SIZES] + [("sampling", "random", size) for size in SIZES]
    linear = [("scoring_linear", "fast", size) for size in SIZES[:3]] + [
        ("scoring_part", "fast", SIZES[i]) for i in (2, 4)
    ]
    return [*rows, *(images if cifar10 else []), *linear, *(("training", name, n) for name, n in NETWORKS.items())]


def copied_per_second() -> float:
    """Bytes read and written a second by a copy of 256 MB, the best of five."""
    source, target = np.ones(1 << 28, np.uint8), np.empty(1 << 28, np.uint8)
    return 2.0 * source.nbytes / min(measured(lambda: np.copyto(target, source))["seconds"] or 1e-3 for _ in range(5))


# --- the picture ----------------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], target: Path) -> None:
    """Seconds and memory against rows, training against work; the floors in grey."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    networks = [row for row in record["rows"] if row["kind"] == "training"]
    panels = 3 if networks else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 5.2), layout="constrained", facecolor="white")
    colours = dict(zip(LABELS, ("#2b6cb0", "#63a4dc", "#0b8793", "#0b8793", "#c05621", "#2f855a"), strict=True))
    copy, rate = record["machine"]["copied_bytes_per_s"], record["machine"]["float32_flops_per_s"]
    for key, label in LABELS.items():
        rows = [row for row in record["rows"] if (row["kind"], row["mode"]) == key]
        x, colour = [row["rows"] for row in rows], colours[key]
        open_marker = {"markerfacecolor": "white"} if key[0] == "scoring_part" else {}
        if rows and "seconds" in rows[0]:
            axes[0].plot(x, [row["seconds"] for row in rows], "o-", color=colour, label=label)
            floors = [max(row.get("flops", 0) / rate, row.get("bytes", 0) / copy) for row in rows]
            single = {"marker": "_", "markersize": 14} if len(x) == 1 else {}  # a line of one point is not seen
            axes[0].plot(x, floors, "--", color=colour, linewidth=1, alpha=0.7, **single)
        if rows:
            axes[1].plot(x, [row["peak"] / 1e9 for row in rows], "o-", color=colour, label=label, **open_marker)
            if "held" in rows[0]:
                axes[1].plot(x, [row["held"] / 1e9 for row in rows], "--", color=colour, linewidth=1, alpha=0.7)
    if networks:
        work = [row["flops"] / 1e9 for row in networks]
        axes[2].plot(
            work, [row["seconds"] for row in networks], "o", color="#6b46c1", label="one TRADES-10 step, float32"
        )
        axes[2].plot(
            sorted(work), [1e9 * w / rate for w in sorted(work)], "--", color="#6b46c1", linewidth=1, alpha=0.7
        )
        for row in networks:
            axes[2].annotate(f"  {row['mode']}", (row["flops"] / 1e9, row["seconds"]), va="top", fontsize=8)
    titles = ("CPU seconds", "peak memory, GB", "training: CPU seconds an image")
    for axis, title, label in zip(axes, titles, ("rows", "rows", "GFLOP an image and step"), strict=False):
        axis.plot([], [], "--", color="#555555", linewidth=1, label="floor: bytes or FLOPs that have to be")
        axis.set(xscale="log", yscale="log", title=title, xlabel=label, facecolor="white")
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.legend(loc="upper left", fontsize=7.5)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    if networks:
        left, right = axes[2].get_xlim()
        axes[2].set_xlim(left, right * (right / left) ** 0.25)
    target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "puma"}):
        figure.savefig(target, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cifar10", nargs="?", default="", help="folder with test-*.parquet; without it no CNN is scored"
    )
    parser.add_argument("--draw", action="store_true", help="only draw what is stored")
    parser.add_argument("--again", action="store_true", help="measure points anew that this machine has measured")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="measure these only")
    parser.add_argument("--toy", action="store_true", help="small sizes, in this process")
    parser.add_argument("--out", type=Path, default=STORED)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--point", nargs=4, metavar=("KIND", "MODE", "ROWS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.point:
        kind, mode, rows, folder = options.point
        print(json.dumps(KINDS[kind](mode, int(rows), Path(folder), options.cifar10)))
        return
    if not options.draw:
        machine = {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "threads": 1,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "numpy": np.__version__,
            "puma": puma.__version__,
            "copied_bytes_per_s": copied_per_second(),
            "float32_flops_per_s": 2 * peak(torch.float32),
        }
        record: dict[str, Any] = {"machine": machine, "rows": []}
        if options.out.exists():
            stored = json.loads(options.out.read_text())
            kept = ("processor", "capability", "torch", "numpy", "puma")
            if [stored["machine"][name] for name in kept] == [machine[name] for name in kept]:
                record = stored
        if options.again:
            kept = [row for row in record["rows"] if row["kind"] not in options.kinds]
            record = {"machine": machine, "rows": kept}
        done = {(row["kind"], row["mode"], row["rows"]) for row in record["rows"]}
        with tempfile.TemporaryDirectory() as folder:
            for kind, mode, rows in points(options.toy, options.cifar10):
                if (kind, mode, rows) in done or kind not in options.kinds:
                    continue
                began = time.perf_counter()
                if options.toy:
                    row = KINDS[kind](mode, rows, Path(folder), options.cifar10)
                else:
                    command = [sys.executable, __file__, "--point", kind, mode, str(rows), folder]
                    command[2:2] = [options.cifar10] if options.cifar10 else []
                    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                record["rows"].append({"kind": kind, "mode": mode, "rows": rows} | row)
                spent = time.perf_counter() - began
                cost = row.get("seconds", row.get("part_seconds"))
                print(
                    f"{kind:15} {mode:16} {rows:11,} {cost:10.3f} s CPU {row['peak'] / 1e9:7.3f} GB ({spent:.0f} s)",
                    flush=True,
                )
                options.out.write_text(json.dumps(record, indent=1) + "\n")
    draw(json.loads(options.out.read_text()), options.picture)


if __name__ == "__main__":
    main()
