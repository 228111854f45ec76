"""How fast images come off the disk: a mapped `.npz` larger than half of memory, and the batches drawn from it.

    python benchmarks/data.py --json data.json             # a real file
    python benchmarks/data.py --sparse --json data.json    # a file of holes: the reader alone, without the disk

Writes the file (about 13 GB on a machine of 24 GB; ``--gigabytes`` to choose), measures in a fresh process, deletes it.
Wall and CPU time are both given: on a busy machine the CPU figure is the one to compare. Reading all of the file is
bounded by the disk and by the kernel, which has to find a page of memory for each page of the file (4 to 10 us each on
the virtual machine of the first figures); the warm figures are of 200,000 images in the page cache.

Targets of a machine with two
cores: 1 M img/s sequential, 100 k img/s in batches of random rows, 20 k single ``pool[i]``, and less than 1 GB of
resident memory while all of the file is read.
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
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.sampler import BatchSampler

TARGETS = {"sequential, warm": 1_000_000, "random batches, warm": 100_000, "single pool[i], warm": 20_000}
RESIDENT_TARGET = 1_000_000_000
IMAGE = (32, 32, 3)


def write_file(path: Path, gigabytes: float) -> int:
    """Write an EDM `.npz` of random pixels; returns its number of images."""
    rows = rows_of(gigabytes)
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


def write_sparse(path: Path, gigabytes: float) -> int:
    """The same with nothing but black pixels, which take no place on the disk and no time to write."""
    rows = rows_of(gigabytes)
    np.save(path.with_name(f"{path.stem}_labels.npy"), np.sort(np.arange(rows) % 10))
    with path.with_suffix(".npy").open("wb") as file:
        file.write(npy_header((rows, *IMAGE), "|u1"))
        file.truncate(file.tell() + rows * int(np.prod(IMAGE)))
    return rows


def rows_of(gigabytes: float) -> int:
    return int(gigabytes * 1e9 / np.prod(IMAGE))


def npy_header(shape: tuple[int, ...], descr: str) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def measured(work: Callable[[], Iterator[int]], seconds: float) -> dict[str, float]:
    """Images per second of wall and of CPU time, counted until the work ends or the time is up."""
    images, wall, before = 0, time.perf_counter(), os.times()
    for count in work():
        images += count
        if time.perf_counter() - wall > seconds:
            break
    wall, after = time.perf_counter() - wall, os.times()
    user, system = after.user - before.user, after.system - before.system
    return {
        "images": images,
        "per_second": images / wall,
        "per_cpu_second": images / max(user + system, 0.01),
        "per_user_second": images / max(user, 0.01),
        "system_share": system / max(user + system, 0.01),
    }


def resident_peak() -> int:
    """Most bytes this process ever held in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(path: Path, seconds: float) -> dict[str, Any]:
    """All figures of one file, in this process."""
    before = resident_peak()
    started = time.perf_counter()
    source = load_dataset(path)
    pool = Pool([load_dataset("digits?resize=32&channels=3"), source])
    opened = time.perf_counter() - started
    rows = len(source)
    sampler = BatchSampler(pool.synthetic, batch_size=1024, synthetic_share=0.7, seed=0)
    warm = np.arange(min(200_000, rows))
    some = np.random.default_rng(0).permutation(warm)

    def cached() -> Iterator[int]:
        for start in range(0, len(warm), 1024):
            yield len(source.read(slice(start, min(start + 1024, len(warm)))))

    def sequential() -> Iterator[int]:
        for start in range(0, rows, 1024):
            yield len(source.read(slice(start, start + 1024)))

    def random_rows() -> Iterator[int]:
        for start in range(0, len(some), 1024):
            yield len(source.read(some[start : start + 1024]))

    def sampled() -> Iterator[int]:
        for step in range(10**9):
            yield len(pool.read(sampler.indices(step)))

    def single() -> Iterator[int]:
        for row in some[:50_000].tolist():
            source[row]
            yield 1

    def indices() -> Iterator[int]:
        for step in range(10**9):
            yield len(sampler.indices(step))

    figures: dict[str, Any] = {"open_seconds": opened, "sequential, all of the file": measured(sequential, 1e9)}
    resident = resident_peak()
    source.read(warm)
    figures["sequential, warm"] = measured(cached, seconds)
    figures["random batches, warm"] = measured(random_rows, seconds)
    figures["single pool[i], warm"] = measured(single, seconds)
    figures["sampled batches over the whole file, as the cache has it"] = measured(sampled, seconds)
    figures["indices alone"] = measured(indices, min(seconds, 3))
    figures["resident_bytes_before"], figures["resident_bytes"] = before, resident
    return figures


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
    parser.add_argument("--sparse", action="store_true", help="a file of holes, as .npy: written in no time")
    parser.add_argument("--seconds", type=float, default=10, help="at most this long for each figure but the first")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not options.sparse and shutil.disk_usage(options.folder).free < options.gigabytes * 1.1e9:
        print(f"not enough space in {options.folder}", file=sys.stderr)
        return 6
    path = Path(tempfile.mkdtemp(prefix="puma-benchmark-", dir=options.folder)) / "large.npz"
    try:
        started = time.perf_counter()
        if options.sparse:
            rows, path = write_sparse(path, options.gigabytes), path.with_suffix(".npy")
        else:
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
        "file_gb": round(rows * int(np.prod(IMAGE)) / 1e9, 1),
        "sparse": options.sparse,
        "numpy": np.__version__,
    }
    figures["crc32_bytes_per_second"] = crc_rate()
    return report(figures, options.json)


def report(figures: dict[str, Any], target: Path | None) -> int:
    """Print the figures beside their targets; 1 if one is missed by CPU time."""
    missed = False
    for name, figure in figures.items():
        if isinstance(figure, dict) and "per_second" in figure:
            goal = TARGETS.get(name)
            good = goal is None or figure["per_cpu_second"] >= goal
            missed |= not good
            mark = "" if goal is None else f"  target {goal:>9,}  {'ok' if good else 'MISSED'}"
            print(
                f"{name:<58}{figure['per_second']:>12,.0f} img/s {figure['per_cpu_second']:>12,.0f} img/CPU-s"
                f" ({figure['system_share']:.0%} of it the kernel's){mark}"
            )
    good = figures["resident_bytes"] < RESIDENT_TARGET
    print(f"resident memory while reading all of it: {figures['resident_bytes'] / 1e6:,.0f} MB ", end="")
    print(f"({figures['resident_bytes_before'] / 1e6:,.0f} MB before)  target 1,000 MB  {'ok' if good else 'MISSED'}")
    print(f"opened in {figures['open_seconds'] * 1e3:.0f} ms; {figures['machine']}")
    if target is not None:
        target.write_text(json.dumps(figures, indent=2) + "\n")
    return int(missed or not good)


if __name__ == "__main__":
    sys.exit(main())
