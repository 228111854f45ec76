"""Everything there is to prove and to measure on one GPU, by one command of at most eight minutes, without a network.

    python benchmarks/gpu.py                             # or `make gpu`; results/gpu/STAGE.json and summary.txt
    python benchmarks/gpu.py --stages training --again   # one stage, measured anew
    python benchmarks/gpu.py --device cpu --toy          # every stage with toy sizes: does it run?
    python benchmarks/gpu.py --wheels                    # what this Python lacks, and how to carry it along

Stages, in order of worth: *right* (the tests marked gpu; CPU and GPU agree), *margins* (DeepFool's images per second,
beside foolbox and adv-lib where installed), *training* (against the plain loop of benchmarks/training.py), *evaluation*
(AutoAttack), *evidence* (as much of studies/cifar10-32px-gpu.toml as the time holds). Each is a process with a time
limit and writes its file after every row: run again, rows that are there are not measured again, those that failed or
found no time are. A row that ends its process, or leaves the device in no state to go on, costs that row alone. What is
missing (packages, images, time) is named in the file. Networks other than the study's and
the robust CNN are as initialised, and images noise where there is no CIFAR-10: passes are those of a network, but how
many an image takes is not what a trained one takes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peers import PEERS, versions
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import puma
from puma import losses
from puma.errors import PumaError

# Everything else of ours is imported by the row that needs it: a package that is absent costs those rows alone.

ROOT = Path(__file__).parents[1]
SHARES = {"right": 80, "margins": 100, "training": 170, "evaluation": 60, "evidence": 70}  # of the time
COMPILING = {"preactresnet-18": 30, "wrn-28-10": 75}  # seconds at least: with fewer left a row would come to nothing
KILL_AFTER = 4  # seconds behind its limit, a stage that has not ended by itself
ENDED = "its process ended"
BROKEN = 86  # exit code of a process whose device does not answer any more
STUDY = ROOT / "studies" / "cifar10-32px-gpu.toml"
DATA = ROOT / "data" / "cifar10-32px"
MANY = 50_000_000
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
THREAT = puma.ThreatModel("Linf", 8 / 255)
WHEELS = {  # module: what to carry for it, and the stages with rows that need it
    "PIL": ("pillow", "right margins training evaluation evidence"),
    "pyarrow": ("pyarrow", "right margins training evaluation evidence"),
    "safetensors": ("safetensors", "right training evaluation evidence"),
    "pydantic": ("pydantic pydantic-core annotated-types typing-inspection", "right training evidence"),
    "lightning_fabric": ("lightning-fabric lightning-utilities fsspec packaging", "right training evidence"),
    "scipy": ("scipy", "right evaluation evidence"),
    "filelock": ("filelock", "right evaluation evidence"),
    "pyautoattack": ("pyautoattack", "right evaluation evidence"),
    "tomli_w": ("tomli-w", "evidence"),
    "typer": ("typer click shellingham annotated-doc", "evidence"),
    "rich": ("rich pygments markdown-it-py mdurl", "evidence"),
    "pandas": ("pandas python-dateutil six", "evidence"),
    "matplotlib": ("matplotlib contourpy cycler fonttools kiwisolver pyparsing", "evidence"),
    "jinja2": ("jinja2 markupsafe", "evidence"),
    "foolbox": ("foolbox eagerpy GitPython gitdb smmap requests urllib3 idna certifi charset-normalizer", "margins"),
    "adv_lib": ("adv-lib tqdm", "margins"),
    "pytest": ("pytest pluggy iniconfig pytest-timeout hypothesis", "right"),
}
Row = dict[str, Any]


def in_json(value: Any) -> Any:
    """The value with NaN and infinity, which JSON does not have, as texts."""
    if isinstance(value, dict):
        return {key: in_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [in_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def finished(row: Row) -> bool:
    return "error" not in row and row.get("passed", True) and row.get("complete", True)


class Stage:
    """The rows of a stage, in a file that is written after each of them."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.toy, self.data, self.out, self.skip = name, options.toy, options.data, options.out, options.skip
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.until = options.until  # of a clock that all processes of the machine share
        self.path = options.out / f"{name}.json"
        known = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.record: Row = {"stage": name, "status": "unfinished", "toy": self.toy}
        found = environment(self.device)
        self.record |= {
            "environment": found,
            "clocks": {"before": clocks()},
            "left_out": known.get("left_out", {}) if self.skip else {},
        }
        self.record["seconds"] = self._before = known.get("seconds", 0.0)
        self.record["rows"] = known.get("rows", {})
        there, here = ({k: v for k, v in r.items() if k != "peers"} for r in (known.get("environment", {}), found))
        if known and name == "evidence" and there != here:
            self.record["rows"] = {}  # the study's folder is what goes on, and tells which task ran where
        elif known and there != here:
            what = ", ".join(
                f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]
            )
            raise SystemExit(f"{self.path} was made elsewhere ({what}): --again, or another --out")
        self._began = time.monotonic()
        self.write()

    def write(self, **changes: Any) -> None:
        self.record |= changes
        self.record["seconds"] = round(self._before + time.monotonic() - self._began, 2)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(in_json(self.record), indent=1, allow_nan=False) + "\n")
        temporary.replace(self.path)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.until - time.monotonic()

    def leave_out(self, key: str, why: str) -> None:
        self.record["left_out"][key] = why
        self.write()

    def row(self, key: str, measure: Callable[[], Row], needs: float = 0.0) -> None:
        """Measure what is not there yet, where ``needs`` seconds are left. A failure is noted; the next row follows."""
        if key in self.record["rows"] and finished(self.record["rows"][key]):
            return
        if key in self.skip:  # tried by the process before this one
            return
        if self.left <= needs:
            self.leave_out(key, "time limit")
            return
        self.record["left_out"].pop(key, None)
        self.record["running"] = key  # which row a killed process was at
        self.write()
        try:
            if self.cuda:
                free_memory()  # what the row before has left would count as this one's
                torch.cuda.reset_peak_memory_stats()
            row = measure()
            if self.cuda:
                row.setdefault("peak_memory_bytes", torch.cuda.max_memory_allocated())
        except ModuleNotFoundError as error:
            row = None
            self.record["left_out"][key] = f"{error} (--wheels)"
        except subprocess.TimeoutExpired:
            row = None
            self.record["left_out"][key] = "time limit"
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:600], "traceback": traceback.format_exc()[-1500:]}
        if row is not None:
            self.record["rows"][key] = row
        del self.record["running"]
        self.write()
        said = f"left out: {self.record['left_out'][key]}" if row is None else figures(row)
        print(f"{self.name:10} {key:48} {said}", flush=True)
        if self.cuda and row and "error" in row:
            try:
                torch.cuda.synchronize()
            except Exception:  # an illegal access, say: nothing works in this process any more
                sys.stdout.flush()
                os._exit(BROKEN)

    def close(self) -> None:
        for key in self.record["rows"]:
            self.record["left_out"].pop(key, None)
        why = list(self.record["left_out"].values())
        whole = not any(text == "time limit" or "--wheels" in text for text in why)
        rows = self.record["rows"].values()
        if not rows:
            status = "nothing run"
        elif ENDED in why or any("error" in row or row.get("passed") is False for row in rows):
            status = "failed"
        else:
            status = "finished" if whole and all(map(finished, rows)) else "not whole"
        self.write(status=status, clocks=self.record["clocks"] | {"after": clocks()})


def environment(device: torch.device) -> Row:
    found: Row = {"puma": puma.__version__, "torch": torch.__version__, "python": platform.python_version()}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "threads": torch.get_num_threads()}
    found |= {
        "peers": versions(),
        "device": device.type,
        "memory_bytes": None,
        "name": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "memory_bytes": properties.total_memory}
    return found


def clocks() -> Row | None:
    """Clocks, temperature and power as the driver tells them; None without one."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return dict(zip(fields.split(","), map(str.strip, said.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def clock(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free_memory() -> None:
    gc.collect()  # loops and compiled models hold themselves in cycles
    torch.cuda.empty_cache()


def images_of(stage: Stage, count: int, size: int) -> Tensor:
    """CIFAR-10's test images, or noise where there are none."""
    if stage.data:
        from puma.data.pool import read_batch

        source = puma.load_dataset(f"{stage.data}/test-00000-of-00001.parquet?resize={size}&subset={count}")
        return read_batch(source, range(count))[0]
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def predicted(model: nn.Module, images: Tensor) -> Tensor:
    from puma.models.checks import true_float32

    with true_float32(images.device.type):  # as what is measured sees them: TF32 would give some another class
        return torch.cat([model(part) for part in images.split(256)]).argmax(1)


# --- right ------------------------------------------------------------------------------------------------------------


def agree(one: Tensor, two: Tensor, most: float) -> Row:
    """Do a tensor and one of the device agree? NaN agrees with NaN alone."""
    two = two.cpu()
    same = (one == two) | (one.isnan() & two.isnan())
    worst = float(torch.where(same, 0.0, (one - two).abs()).nan_to_num(torch.inf).max())
    return {"worst_difference": worst, "allowed": most, "passed": worst <= most}


def right(stage: Stage) -> None:
    """The CPU and the device agree; PGD and a training step never wait for the host; the tests marked gpu."""
    from robust_cnn import load_robust_cnn

    from puma.models.checks import true_float32

    places, noise = ("cpu", str(stage.device)), torch.Generator().manual_seed(0)
    x = images_of(stage, 8 if stage.toy else 256, 16)
    models = [load_robust_cnn().to(place).requires_grad_(False) for place in places]
    y = predicted(models[0], x)
    batches = [(model, x.to(place), y.to(place)) for model, place in zip(models, places, strict=True)]
    clean = 5 * torch.randn(64, 10, generator=noise)
    logits = [[tensor.to(place) for tensor in (clean, clean.flip(1), torch.arange(64) % 10)] for place in places]

    def margin(norm: str, mode: str) -> Row:
        one, two = (puma.deepfool(*batch, norm=norm, mode=mode) for batch in batches)
        row = agree(one.margin, two.margin, 1e-3) | {"statuses_differ": int((one.codes != two.codes.cpu()).sum())}
        differ = int(((one.margin - two.margin.cpu()).abs() > 1e-3).sum())  # by rounding alone on one image at times:
        few = differ <= len(x) // 100 and math.isfinite(row["worst_difference"])  # another point of the boundary
        return row | {"images_differ": differ, "passed": few and not row["statuses_differ"]}

    def attacked(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with true_float32(images.device.type), torch.no_grad():
            adversarial = puma.pgd(model, images, labels, threat=THREAT, start="none")
            return losses.cross_entropy(model(adversarial), labels).mean()

    def one_step() -> Row:
        import training as plain  # benchmarks/training.py

        from puma.training.recipe import load_recipe

        changes = {"schedule": "constant", "cycle_momentum": False, "crop": 0, "flip": False, "validation_images": 0}
        changes |= {"batch_size": 32, "attack_start_linf": "none", "attack_steps": 2, "ema": 0.0}
        recipe = load_recipe("trades-edm", steps=1, learning_rate=0.1, **changes)
        network, pool = puma.build_model("small-cnn", 10), plain.random_pool(64)
        with true_float32(stage.device.type):
            trained = [puma.train(network, pool, threat=THREAT, recipe=recipe, device=d).model.cpu() for d in places]
        start, one, two = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (network, *trained))
        off, way = float((two - one).norm() / (one - start).norm()), float((one - start).norm())
        return {"difference_of_step": off, "step": way, "passed": off <= 0.02}

    def flags(attack: str, count: int) -> Row:
        test = as_source(x[:count], y[:count])
        one, two = (puma.evaluate(model, test, "Linf:2/255", attack=attack).robust for model in models)
        differ = int((one != two).sum())
        most = max(count // 50, 1)  # the starts are drawn by each device's own generator
        return {"images": len(one), "robust": int(one.sum()), "flags_differ": differ, "passed": differ <= most}

    def marked_tests() -> Row:
        files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(stage.left, 1), check=False)
        said = ((run.stdout or run.stderr).strip().splitlines() or [""])[-1]
        row: Row = {"says": said, "passed": run.returncode == 0 and not (stage.cuda and "SKIPPED" in run.stdout)}
        return row if row["passed"] else row | {"output": [*run.stdout.splitlines(), *run.stderr.splitlines()][-60:]}

    def host_waits(work: Callable[[], object]) -> Row:
        work()  # whatever is set up once
        row: Row = {"host_waits": 0}
        try:
            torch.cuda.set_sync_debug_mode("error")
            work()
        except (RuntimeError, PumaError) as error:  # what a model raises becomes a ModelError
            row["first"] = str(error).splitlines()[0][:200]
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
            row["host_waits"] = len(caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return row

    def pgd_waits() -> Row:
        from puma.attacks.pgd import ascend

        model, images, labels = batches[1]
        eps = torch.full((len(images),), THREAT.eps, device=images.device)

        def loss(perturbed: Tensor) -> Tensor:
            return losses.cross_entropy(model(perturbed), labels)

        row = host_waits(lambda: ascend(loss, images, eps, None, THREAT, steps=10, step_size=2 / 255))
        return row | {"passed": "first" not in row}

    def step_waits() -> Row:
        import training as plain

        pool, changes = plain.random_pool(64), {"channels_last": True, "precision": "bf16"}
        loop = plain.Ours(puma.build_model("small-cnn", 10), pool, plain._recipe(32, **changes))
        row = host_waits(loop.step)
        return row | {"passed": "first" not in row}

    for norm in ("Linf", "L2"):
        for mode in ("fast", "deepfool", "refined", "tight"):
            stage.row(f"deepfool {norm} {mode}", lambda norm=norm, mode=mode: margin(norm, mode))
    stage.row("pgd loss", lambda: agree(*(attacked(*batch) for batch in batches), 1e-3))
    for name, loss in {
        "trades": lambda a, b, label: losses.trades(a, b, label, weight=5.0, smoothing=0.1),
        "mart": lambda a, b, label: losses.mart(a, b, label, weight=5.0),
        "pgd-at": lambda a, b, label: losses.cross_entropy(b, label),
        "cw": lambda a, b, label: losses.carlini_wagner(b, label),
    }.items():
        stage.row(f"loss {name}", lambda loss=loss: agree(*(loss(*triple) for triple in logits), 1e-3))
    stage.row("training step", one_step)
    if stage.cuda:
        stage.row("host waits: pgd", pgd_waits)
        stage.row("host waits: training step", step_waits)
        # DeepFool asks the host which images are left (docs/margins.md): how often is told, not judged
        stage.row("host waits: deepfool", lambda: host_waits(lambda: puma.deepfool(*batches[1])))
    else:
        stage.leave_out("host waits", "no CUDA device")
    stage.row("flags of apgd-ce", lambda: flags("apgd-ce", len(x)))
    if stage.toy:
        stage.leave_out("flags of AutoAttack", "toy: the stage evaluation runs it")
    else:
        stage.row("flags of AutoAttack", lambda: flags("standard", 16))
    if importlib.util.find_spec("pytest"):
        stage.row("tests marked gpu", marked_tests)
    else:
        stage.leave_out("tests marked gpu", "pytest is not installed")


# --- margins ----------------------------------------------------------------------------------------------------------


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices, the fastest of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        began = clock(device)
        a @ a
        seconds.append(clock(device) - began)
    return 2 * size**3 / min(seconds[1:])


def margins(stage: Stage) -> None:
    """Images per second of each mode and precision, eager and compiled, and of the other libraries (float32)."""
    from puma.models.checks import true_float32

    # four sizes, with and without gradients and autocast, are more graphs than the eight after which torch by itself
    # goes on uncompiled without a word
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    sizes = {"small-cnn": 8} if stage.toy else {"preactresnet-18": 1024, "wrn-28-10": 256}
    side = 256 if stage.toy else 8192
    stage.row("peak", lambda: {kind: matmul_peak(stage.device, dtype, side) for kind, dtype in DTYPES.items()})

    @functools.cache
    def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
        model = puma.build_model(name, 10).eval().to(stage.device, memory_format=torch.channels_last)
        x = images_of(stage, sizes[name], 32).to(stage.device)
        return model.requires_grad_(False), x, predicted(model, x)  # peers would compute gradients of the weights, too

    def ours(name: str, mode: str, precision: str, compiled: bool) -> Row:
        model, x, y = network(name)
        proxy = torch.compile(model, dynamic=False) if compiled else None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x[:1])
        search = {"mode": mode, "precision": precision, "proxy": proxy, "chunk": min(512, len(x))}
        if not compiled:  # kernels are loaded and chosen for whole chunks and for few images
            puma.deepfool(model, x, y, **search | {"mode": "fast"})
            puma.deepfool(model, x[:64], y[:64], **search)
        while True:  # until nothing is compiled while the clock runs
            graphs, began = counters["stats"]["unique_graphs"], clock(stage.device)
            hit = puma.deepfool(model, x, y, **search)
            rate = len(x) / (clock(stage.device) - began)
            if counters["stats"]["unique_graphs"] == graphs:
                break
        forwards, backwards = (passed / len(x) for passed in hit.passes)
        work = counter.get_total_flops() * (forwards + backwards) * rate  # backward to the input: as one forward pass
        row = {"images_per_s": rate, "forwards": forwards, "backwards": backwards, "images": len(x)}
        if peak := stage.record["rows"].get("peak", {}).get("bf16"):
            row["share_of_bf16_peak"] = work / peak
        row["crossed"] = float((hit.status == "crossed").mean())
        if compiled:
            row["graphs"] = graphs
        return row | {"hours_for_50_million": MANY / rate / 3600}

    def theirs(name: str, peer: str) -> Row:
        model, x, y = network(name)
        attack = PEERS[peer]("Linf")

        def timed(count: int) -> float:
            began = clock(stage.device)
            attack(model, x[:count], y[:count])
            return clock(stage.device) - began

        with true_float32(stage.device.type):  # as ours computes
            timed(32)  # whatever is set up once
            count = min(256 if timed(32) < 1 else 64, len(x))  # the slow one takes seconds for few
            rate = count / timed(count)
        x = x[:count]
        return {"images_per_s": rate, "images": len(x), "hours_for_50_million": MANY / rate / 3600}

    def every(precision: str, compiled: bool, names: list[str]) -> None:
        for mode in ("refined", "deepfool", "fast", "tight"):
            for name in names:
                key, needs = f"{name} {mode} {precision}{' compiled' if compiled else ''}", COMPILING.get(name, 0)
                one = functools.partial(ours, name, mode, precision, compiled)
                stage.row(key, one, needs if compiled and mode == "refined" else 0)  # its graphs serve the others

    every("float32", False, list(sizes))
    for peer in ("foolbox", "adv-lib"):
        for name in sizes:
            if peer in versions():
                stage.row(f"{name} {peer}", lambda n=name, p=peer: theirs(n, p))
            else:
                stage.leave_out(f"{name} {peer}", "not installed")
    every("bf16", False, list(sizes))
    for name in sizes:  # one after the other: compiling takes longer than all the rest
        every("bf16", True, [name])
        every("float32", True, [name])


# --- training ---------------------------------------------------------------------------------------------------------


def training(stage: Stage) -> None:
    """TRADES-10, samples per second against the plain loop with the same TF32 setting, turn by turn."""
    import training as plain

    batches = {"small-cnn": 8} if stage.toy else {"preactresnet-18": 512, "wrn-28-10": 512}
    # with toy sizes a round figure: measuring it takes longer than all the rest
    kinds = {"float32": (torch.float32, False), "tf32": (torch.float32, True), "bf16": (torch.bfloat16, True)}

    def peak(dtype: torch.dtype, tf32: bool) -> float:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        return 1e12 if stage.toy else plain.peak(dtype)

    stage.row("peak", lambda: {kind: peak(*given) for kind, given in kinds.items()})

    def measure(name: str, variant: str, tf32: bool, graphs: bool) -> Row:
        batch, fastest = batches[name], stage.record["rows"].get("peak", {})
        peaks = {"float32": fastest.get("tf32" if tf32 else "float32"), "bf16": fastest.get("bf16")}
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        torch._dynamo.reset()
        # by an option of the call: settings of inductor's are each thread's own, and the backward pass is compiled in
        # another one
        options = {"options": {"triton.cudagraphs": True}} if graphs else {}
        with patch("torch.compile", functools.partial(torch.compile, **options)):
            while True:
                try:
                    rows = plain.compare(name, 1 if stage.toy else 5, [variant], batch, peaks)
                    break
                except torch.OutOfMemoryError:
                    if batch < 64:
                        raise
                    batch //= 2  # named in the row
                free_memory()
        slow, fast = rows
        kept = ("batch", "samples_per_second", "speedup", "speedup_quartiles", "share_of_peak", "peak_memory_bytes")
        row = {key: fast[key] for key in kept}
        return row | {"plain_samples_per_second": slow["samples_per_second"], "tf32": tf32, "cuda_graphs": graphs}

    settings = {  # variant of benchmarks/training.py, TF32 for both loops, CUDA graphs; minutes of compiling last
        "bf16": ("bf16", True, False),
        "bf16 compiled": ("bf16 compiled", True, False),
        "tf32": ("float32", True, False),
        "bf16 compiled, CUDA graphs": ("bf16 compiled", True, True),
        "tf32 compiled": ("float32 compiled", True, False),
        "float32": ("float32", False, False),
    }
    for setting, arguments in settings.items():
        for name in reversed(batches) if "compiled" in setting else batches:  # the large one's goal is with compiling
            if arguments[2] and not stage.cuda:
                stage.leave_out(f"{name} {setting}", "no CUDA device")
            else:
                needs = COMPILING.get(name, 0) if "compiled" in setting else 0
                stage.row(f"{name} {setting}", lambda n=name, a=arguments: measure(n, *a), needs)


# --- evaluation -------------------------------------------------------------------------------------------------------


def as_source(images: Tensor, labels: Tensor) -> Any:
    from puma.data.source import Source, in_memory

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return Source(in_memory(np.ascontiguousarray(pixels)), labels.cpu().numpy(), name="gpu", fingerprint="1" * 64)


def evaluation(stage: Stage) -> None:
    """AutoAttack's forward-equivalents per second (a gradient is two). eps is so small that images withstand.

    The hours are those of 10,000 images that all withstand AutoAttack standard, at the rate of the row's attack.
    """

    def measure(name: str, attack: str, count: int) -> Row:
        from puma.evaluation import estimate_cost

        model = puma.build_model(name, 10).eval().to(stage.device, memory_format=torch.channels_last)
        x = (images_of(stage, count, 32) * 255).round().div(255).to(stage.device)
        test = as_source(x, predicted(model, x))
        puma.evaluate(model, test, "Linf:1e-5", attack="pgd-2", batch_size=256)  # warms up
        began = clock(stage.device)
        result = puma.evaluate(model, test, "Linf:1e-5", attack=attack, batch_size=256)
        seconds = clock(stage.device) - began
        passes = sum(int(entry["cost"]) for entry in result.meta["log"])
        full = estimate_cost(model, test).passes / count * 10_000
        row = {"images": count, "attack": attack, "seconds": seconds, "passes_per_s": passes / seconds}
        row["withstood"] = float(result.robust.mean())
        return row | {"hours_for_10000_images": full / (passes / seconds) / 3600}

    if stage.toy:
        stage.row("small-cnn standard", lambda: measure("small-cnn", "standard", 4))
    else:
        stage.row("preactresnet-18 apgd-ce", lambda: measure("preactresnet-18", "apgd-ce", 512))
        stage.row("wrn-28-10 apgd-ce", lambda: measure("wrn-28-10", "apgd-ce", 128))
        stage.row("preactresnet-18 standard", lambda: measure("preactresnet-18", "standard", 64))


# --- evidence ---------------------------------------------------------------------------------------------------------


def toy_study(folder: Path) -> Path:
    """The study's settings with few images of noise, a small network and a weak attack."""
    from puma.study.folder import StudyFolder
    from puma.study.spec import StudySpec
    from puma.training.recipe import load_recipe

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, count in (("real", 60), ("oracle", 60), ("test", 40)):
        pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", image=pixels, label=np.arange(count) % 10)
    values = tomllib.loads(STUDY.read_text())
    changes = {"steps": 2, "batch_size": 16, "attack_steps": 1, "precision": "float32", "compile": False}
    recipe = load_recipe(ROOT / values["recipe"], **changes)
    (folder / "toy.toml").write_text(recipe.to_toml())
    pool = {"real": str(folder / "real.npz"), "test": str(folder / "test.npz")}
    values |= {"recipe": str(folder / "toy.toml"), "pool": pool | {"synthetic": [str(folder / "oracle.npz")]}}
    values |= {"network": {"name": "small-cnn"}, "evaluation": {"attack": "pgd-1", "mislabelled": 0}}
    values |= {"margins": {"mode": "fast", "folds": 1}, "grid": [values["grid"][0] | {"seeds": [0]}]}
    StudyFolder.create(StudySpec.parse(values), folder / "study")
    return folder / "study"


def pack(study: Path, target: Path) -> None:
    """The small files of a study's folder."""
    temporary = target.with_suffix(".tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        archive.add(study, study.name, filter=lambda entry: None if entry.size > 4 << 20 else entry)
    temporary.replace(target)


def evidence(stage: Stage) -> None:
    """The study, until the time is over; its folder goes on at the next run.

    ``study.tar.gz`` holds its small files: on another machine the study goes on from it (the weights are made again).
    """
    out = stage.out / "toy" / "study" if stage.toy else stage.out / "study"
    packed = stage.out / "study.tar.gz"
    files = [DATA / f"{name}.npz" for name in ("real-10000", "oracle-40000", "test")]
    ready = stage.toy or all(file.is_file() for file in files)
    if not ready and not stage.data:
        stage.leave_out("study", "no images: python studies/cifar10_16px.py FOLDER_OF_CIFAR10_PARQUET --size 32")
        return

    def study() -> Row:
        from puma.study.folder import StudyFolder, collect
        from puma.study.stages import study_tasks

        if packed.is_file() and not out.is_dir():
            with tarfile.open(packed) as archive:
                archive.extractall(out.parent, filter="data")
        if not ready:
            run([str(ROOT / "studies" / "cifar10_16px.py"), str(stage.data), "--size", "32"])
        given = out if out.is_dir() else toy_study(out.parent) if stage.toy else STUDY
        budget = f"{max(int(stage.left) - 15, 1)}s"  # it stops by a checkpoint, which takes a while
        run(["-m", "puma", "study", "run", str(given), "--out", str(out), "--time-budget", budget, "--quiet"])
        pack(out, packed)
        folder = StudyFolder.open(out)
        tasks = study_tasks(folder)
        done = {task.name: r for task in tasks if (r := folder.result(task.name)) is not None}
        row: Row = {"tasks_done": len(done), "tasks": len(tasks), "complete": len(done) == len(tasks)}
        row["task_seconds"] = {name: result.get("seconds") for name, result in done.items()}
        return row | {"results": json.loads(json.dumps(collect(folder), default=str)), "folder": out.name}

    def run(arguments: list[str]) -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")

    stage.row("study", study)


# --- the command ------------------------------------------------------------------------------------------------------

STAGES = {"right": right, "margins": margins, "training": training, "evaluation": evaluation, "evidence": evidence}


def figures(row: Row) -> str:
    """A row's figures on one line."""
    if "error" in row:
        return f"FAILED  {row['error']}"[:160]
    shown = [k for k, v in row.items() if isinstance(v, (int, float, str)) and k not in ("passed", "complete")]
    texts = [f"{key} {row[key]:.4g}" if isinstance(row[key], float) else f"{key} {row[key]}" for key in shown]
    verdict = {True: ["ok"], False: ["WRONG"]}.get(row.get("passed"), [])
    return "  ".join([*verdict, *texts])


def summary(out: Path) -> str:
    lines = []
    for name in STAGES:
        if not (out / f"{name}.json").is_file():
            lines.append(f"{name:11} not run")
            continue
        record = json.loads((out / f"{name}.json").read_text())
        found = record["environment"]
        lines.append(
            f"{name:11} {record['status']}, {record['seconds']:.0f} s, {found['name']}, torch {found['torch']}"
        )
        lines += [f"    {key:46} {figures(row)}" for key, row in record["rows"].items()]
        lines += [f"    {key:46} left out: {why}" for key, why in record["left_out"].items()]
    return "\n".join(lines) + "\n"


def missing(stages: list[str]) -> dict[str, tuple[str, str]]:
    """What of `WHEELS` this Python lacks for some stages."""
    wanted = {module: row for module, row in WHEELS.items() if set(row[1].split()) & set(stages)}
    return {module: row for module, row in wanted.items() if importlib.util.find_spec(module) is None}


def how_to_carry(stages: list[str]) -> str:
    absent = missing(stages)
    if not absent:
        return "nothing is missing here"
    lines = [f"{module:17} is not here; rows of {row[1]} are left out" for module, row in absent.items()]
    version, tags = f"{sys.version_info.major}.{sys.version_info.minor}", ("2_28", "2_17", "2014")
    platforms = " ".join(
        f"--platform manylinux{'' if tag == '2014' else '_'}{tag}_{platform.machine()}" for tag in tags
    )
    lines += [
        "where there is a network (typing-extensions too if torch is without; `unzip` because pyautoattack's wheel of",
        "42 MB is 0.1 MB without its examples, and all the others are 6 MB):",
        f"  python3 -m pip download --no-deps --only-binary=:all: --python-version {version} {platforms} -d wheels "
        + " ".join(row[0] for row in absent.values()),
        "  for wheel in wheels/*.whl; do unzip -qo $wheel -d site; done; rm -rf site/pyautoattack/examples",
        "carry the folder site along, and here: export PYTHONPATH=$PWD/site",
    ]
    return "\n".join(lines)


def run_stage(name: str, until: float, options: argparse.Namespace) -> bool:
    """A stage in a process of its own, which is ended with all it started when its time is over.

    Where a row ends the process, or the device does not answer after it, the rows behind it are run in a new one.
    False if the process refused to run.
    """
    path, tried = options.out / f"{name}.json", list[str]()
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    if options.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    while True:
        command = [sys.executable, __file__, "--stage", name, "--until", str(until), "--out", str(options.out)]
        command += ["--device", options.device, *(["--toy"] if options.toy else [])]
        command += ["--data", str(options.data)] if options.data else []
        command += [word for key in tried for word in ("--skip", key)]
        process = subprocess.Popen(command, env=variables, start_new_session=True)
        over = ENDED
        try:
            code = process.wait(max(until - time.monotonic(), 0) + KILL_AFTER)
        except subprocess.TimeoutExpired:
            code, over = -1, "time limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        record = json.loads(path.read_text()) if code and path.is_file() else {"status": ""}
        if record["status"] != "unfinished":
            return code == 0
        running = record.pop("running", None)
        if running or over == "time limit":
            record["left_out"][running or "all"] = over
        path.write_text(json.dumps(record | {"status": "failed" if over != "time limit" else over}, indent=1) + "\n")
        failed = [key for key, row in record["rows"].items() if "error" in row] + [running] * bool(running)
        if over == "time limit" or not set(failed) - set(tried) or until - time.monotonic() < 10:
            return True
        tried += sorted(set(failed) - set(tried))


def end_with_parent() -> None:
    """A killed command measures nothing any more: the next one has the device to itself."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    if os.getpgid(0) == os.getpid():  # with all that it started
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the JSON files")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 in Parquet (default: shared/data/cifar10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--minutes", type=float, default=8, help="of all stages together")
    parser.add_argument("--again", action="store_true", help="measure anew what is finished")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument(
        "--wheels", action="store_true", help="only say which packages are absent and how to carry them"
    )
    options = parser.parse_args()
    if options.wheels:
        print(how_to_carry(options.stages))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage ends, too
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        if options.toy:  # without a C++ compiler's half minute
            torch.compile = functools.partial(torch.compile, backend="aot_eager")
        threading.Thread(target=end_with_parent, daemon=True).start()
        stage = Stage(options.stage, options)
        try:
            STAGES[options.stage](stage)
        except ModuleNotFoundError as error:
            stage.leave_out("all", f"{error} (--wheels)")
        stage.close()
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; to see that everything runs: --device cpu --toy")
        return 2
    beside = [ROOT / "shared" / "data" / "cifar10", ROOT.parent / "shared" / "data" / "cifar10"]
    options.data = options.data or (None if options.toy else next((p for p in beside if p.is_dir()), None))
    if missing(options.stages):
        print(how_to_carry(options.stages), flush=True)
    until, waiting = time.monotonic() + 60 * options.minutes, []
    for name in options.stages:
        path = options.out / f"{name}.json"
        if options.again:
            path.unlink(missing_ok=True)
        known = json.loads(path.read_text()) if path.is_file() else {"toy": options.toy, "status": ""}
        if known["toy"] != options.toy:
            raise SystemExit(f"{path} was made with{'' if known['toy'] else 'out'} --toy: --again, or another --out")
        if known["status"] == "finished":
            print(f"{name:10} is finished: {path}")
        else:
            waiting.append(name)
    ran = True
    while waiting:  # time that a stage leaves over falls to those behind it
        share = SHARES[waiting[0]] / sum(SHARES[name] for name in waiting)
        limit = max((until - time.monotonic()) * share - KILL_AFTER, 1)
        ran &= run_stage(waiting.pop(0), time.monotonic() + limit, options)
    study = options.out / "toy" / "study" if options.toy else options.out / "study"
    if "evidence" in options.stages and study.is_dir():  # the stage itself does not where its time was over
        pack(study, options.out / "study.tar.gz")
    text = summary(options.out)
    (options.out / "summary.txt").write_text(text)
    print("\n" + text)
    files = [options.out / f"{name}.json" for name in options.stages]
    return int(
        not ran or not all(path.is_file() and json.loads(path.read_text())["status"] != "failed" for path in files)
    )


if __name__ == "__main__":
    sys.exit(main())
