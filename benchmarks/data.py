"""How fast images come off the disk: a mapped `.npz` larger than half of memory, and the batches drawn from it.

    OMP_NUM_THREADS=1 python benchmarks/data.py --folder /path/with/space --json data.json

Writes the file (about 13 GB on a machine of 24 GB; ``--gigabytes`` to choose), measures in a fresh process, deletes it.

Reading all of the file is measured against its floor: ``pread`` of the same bytes into one buffer, which is what the
disk and the kernel take when none of our code runs. Both read turn by turn, 256 MiB each, so that whatever else the
machine does hits both alike. Before the first pass the file is dropped from the page cache; the second finds what the
kernel kept of it; the third, ours alone, usually finds all. "From the disk" is what the kernel says it fetched. Random
rows are drawn from all of the file.

Wall and CPU time are both given; on a busy machine the CPU figure is the one to compare. Last comes the share of a
training step that is spent on data, where a step is cheapest: the step of ``benchmarks/training.py`` with the small
CNN, fed from this file.

Targets on two cores, from the page cache: 1 M img/s in sequence, 100 k img/s in batches of random rows, 20 k single
``pool[i]``; and less than 1 GB of resident memory while all of the file is read.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from puma.data.load import load_dataset
from puma.data.pool import BatchSampler, Pool
from puma.data.source import Source

TARGETS = {"sequential, third pass": 1_000_000, "random batches of 1,024": 100_000, "single pool[i]": 20_000}
RESIDENT_TARGET = 1_000_000_000
IMAGE, BYTES = (32, 32, 3), 32 * 32 * 3
BLOCK, TURN = 1024, 87_382  # images: of one read, and of one turn (256 MiB)


@dataclass
class Cost:
    """What some reads took: images read, seconds of wall, user and system time, bytes that came from the disk."""

    images: int = 0
    wall: float = 0.0
    user: float = 0.0
    system: float = 0.0
    fetched: int = 0

    def add(self, work: Iterator[int], seconds: float = float("inf")) -> None:
        """Do ``work``, which yields how many images it has read, to its end or until the time is up."""
        wall, before, fetched = time.perf_counter(), os.times(), fetched_bytes()
        for count in work:
            self.images += count
            if time.perf_counter() - wall > seconds:
                break
        after = os.times()
        self.wall += time.perf_counter() - wall
        self.user += after.user - before.user
        self.system += after.system - before.system
        self.fetched += fetched_bytes() - fetched

    def told(self) -> dict[str, float]:
        cpu = max(self.user + self.system, 0.01)
        return {
            "images": self.images,
            "per_second": self.images / self.wall,
            "per_cpu_second": self.images / cpu,
            "system_share": self.system / cpu,
            "from_disk": min(self.fetched / (self.images * BYTES), 1.0),
        }


def fetched_bytes() -> int:
    """Bytes that this process has made the kernel fetch from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def resident_peak() -> int:
    """Most bytes this process ever held in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def write_file(path: Path, gigabytes: float) -> int:
    """Write an EDM `.npz` of random pixels; returns its number of images."""
    rows = int(gigabytes * 1e9 / BYTES)
    block = np.random.default_rng(0).integers(0, 256, (8192, *IMAGE), dtype=np.uint8)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("image.npy", "w", force_zip64=True) as member:
            member.write(npy_header((rows, *IMAGE), "|u1"))
            for start in range(0, rows, len(block)):
                piece = block[: rows - start]
                piece[:, 0, 0, :2] = np.arange(start, start + len(piece), dtype=np.uint32)[:, None] % [251, 241]
                member.write(piece.data)
        with archive.open("label.npy", "w", force_zip64=True) as member:
            member.write(npy_header((rows,), "<i8"))
            member.write(np.sort(np.arange(rows) % 10).astype("<i8").tobytes())
    return rows


def npy_header(shape: tuple[int, ...], descr: str) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # what is not on the disk yet would stay
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def pread(path: Path) -> Callable[[int, int], Iterator[int]]:
    """The floor: bytes of rows ``start`` to ``stop`` into one buffer, not aligned to rows, nothing kept."""
    descriptor, buffer = os.open(path, os.O_RDONLY), np.empty(BLOCK * BYTES, np.uint8).data

    def read(start: int, stop: int) -> Iterator[int]:
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            yield os.preadv(descriptor, [buffer[: (last - first) * BYTES]], first * BYTES) // BYTES

    return read


def ours(source: Source) -> Callable[[int, int], Iterator[int]]:
    def read(start: int, stop: int) -> Iterator[int]:
        for first in range(start, stop, BLOCK):
            yield len(source.read(slice(first, min(first + BLOCK, stop))))

    return read


def turn_by_turn(path: Path, source: Source) -> tuple[dict[str, float], dict[str, float]]:
    """All of the file once, every other turn by ``pread`` alone; the figures of ours and of the floor."""
    readers = [(ours(source), Cost()), (pread(path), Cost())]
    for number, start in enumerate(range(0, len(source), TURN)):
        reader, cost = readers[number % 2]
        cost.add(reader(start, min(start + TURN, len(source))))
    return readers[0][1].told(), readers[1][1].told()


def measure(path: Path, seconds: float) -> dict[str, Any]:
    """All figures of one file, in this process."""
    figures: dict[str, Any] = {"resident_bytes_before": resident_peak()}
    started = time.perf_counter()
    source = load_dataset(path)
    figures["open_seconds"] = time.perf_counter() - started
    pool = Pool([load_dataset("digits?resize=32&channels=3"), source])
    drop_from_cache(path)
    for name in ("sequential, first pass", "sequential, second pass"):
        figures[name], figures[f"{name}: the floor"] = turn_by_turn(path, source)
    whole = Cost()
    whole.add(ours(source)(0, len(source)))
    figures["sequential, third pass"] = whole.told()
    figures["resident_bytes"] = resident_peak()
    random = np.random.default_rng(0)
    sampler = BatchSampler(pool.synthetic, batch_size=1024, synthetic_share=0.7, seed=0)

    def random_batches() -> Iterator[int]:
        while True:
            yield len(pool.read(random.integers(len(pool) - len(source), len(pool), 1024)))

    def sampled() -> Iterator[int]:
        for step in range(10**9):
            yield len(pool.read(sampler.indices(step)))

    def single() -> Iterator[int]:
        for row in random.integers(len(pool) - len(source), len(pool), 10**6).tolist():
            assert pool[row][0].shape == IMAGE
            yield 1

    works = {"random batches of 1,024": random_batches, "single pool[i]": single, "batches of the sampler": sampled}
    for name, work in works.items():
        cost = Cost()
        cost.add(work(), seconds)
        figures[name] = cost.told()
    figures["crc32_bytes_per_second"] = crc_rate()
    figures["training"] = share_of_a_step(pool)
    return figures


def share_of_a_step(pool: Pool, steps: int = 6) -> dict[str, float]:
    """CPU time of one training step and of its data alone: indices, rows, augmentation, start noise."""
    from training import THREAT, Ours  # benchmarks/training.py

    from puma.models.networks import build_model
    from puma.training.recipe import load_recipe

    recipe = load_recipe("trades-edm", batch_size=256, steps=100_000)
    loop = Ours(build_model("small-cnn", 10, norm="batch"), pool, recipe)
    batches = loop.training.job.batches
    loop.step()
    whole, data = 0.0, 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        loop.step()
        whole += time.process_time() - began
        began = time.process_time()
        batches.get(step)
        data += time.process_time() - began
    return {"batch": 256, "eps": THREAT.eps, "step_seconds": whole / steps, "data_seconds": data / steps}


def crc_rate() -> float:
    """Bytes per second of the check that `verify="full"` makes."""
    data = bytes(64 << 20)
    started = time.perf_counter()
    zlib.crc32(data)
    return len(data) / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    half = psutil.virtual_memory().total * 0.52 / 1e9
    parser.add_argument("--gigabytes", type=float, default=half, help="size of the file (default: over half of memory)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where it is written")
    parser.add_argument("--seconds", type=float, default=10, help="for each figure of random rows")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if shutil.disk_usage(options.folder).free < options.gigabytes * 1.1e9:
        print(f"not enough space in {options.folder}", file=sys.stderr)
        return 6
    path = Path(tempfile.mkdtemp(prefix="puma-benchmark-", dir=options.folder)) / "large.npz"
    try:
        started = time.perf_counter()
        rows = write_file(path, options.gigabytes)
        print(f"wrote {path.stat().st_size / 1e9:.1f} GB, {rows:,} images, in {time.perf_counter() - started:.0f} s")
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            figures = fresh.apply(measure, (path, options.seconds))
    finally:
        shutil.rmtree(path.parent)
    figures["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": os.getloadavg()[0],
        "file_gb": round(rows * BYTES / 1e9, 1),
        "numpy": np.__version__,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return report(figures)


def report(figures: dict[str, Any]) -> int:
    """Print the figures beside their targets; 1 if one is missed by CPU time."""
    missed = False
    for name, figure in figures.items():
        if not isinstance(figure, dict) or "per_second" not in figure:
            continue
        goal = TARGETS.get(name)
        good = goal is None or figure["per_cpu_second"] >= goal
        missed |= not good
        mark = "" if goal is None else f"  target {goal:>9,}  {'ok' if good else 'MISSED'}"
        print(
            f"{name:<38}{figure['per_second']:>11,.0f} img/s {figure['per_cpu_second']:>11,.0f} img/CPU-s"
            f" ({figure['system_share']:4.0%} the kernel's, {figure['from_disk']:4.0%} from the disk){mark}"
        )
    good = figures["resident_bytes"] < RESIDENT_TARGET
    print(f"resident memory after reading all of it: {figures['resident_bytes'] / 1e6:,.0f} MB ", end="")
    print(f"({figures['resident_bytes_before'] / 1e6:,.0f} MB before)  target 1,000 MB  {'ok' if good else 'MISSED'}")
    step = figures["training"]
    print(
        f"a training step of the small CNN, batch {step['batch']}: {step['step_seconds']:.2f} CPU-s, of which data "
        f"{step['data_seconds'] * 1e3:.1f} ms ({step['data_seconds'] / step['step_seconds']:.1%})"
    )
    print(f"opened in {figures['open_seconds'] * 1e3:.0f} ms; {figures['machine']}")
    return int(missed or not good)


if __name__ == "__main__":
    sys.exit(main())
