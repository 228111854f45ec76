"""The whole of `make gpu` on the CPU in toy sizes: its first run on a GPU is not its first run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("right", "margins", "training", "evaluation", "evidence")
ROWS = {
    "right": ["deepfool Linf refined", "pgd loss", "loss trades", "training step", "flags of apgd-ce"],
    "margins": ["peak", "small-cnn refined float32", "small-cnn tight bf16 compiled"],
    "training": ["small-cnn float32", "small-cnn bf16 compiled"],
    "evaluation": ["small-cnn standard"],
    "evidence": ["study"],
}


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--out", str(out), *arguments]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, cwd=out.parent, env=variables, capture_output=True, text=True, check=False)


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((out / f"{name}.json").read_text()) for name in STAGES}


def test_every_stage_runs_on_the_cpu_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out = tmp_path / "gpu"
    done = run(out, "--toy")
    assert done.returncode == 0, done.stdout + done.stderr
    made = records(out)
    for name, record in made.items():
        assert record["status"] == "finished", record
        assert record["seconds"] > 0
        assert {"torch", "puma", "python", "cuda", "name", "memory_bytes", "peers"} <= set(record["environment"])
        assert set(record["clocks"]) == {"before", "after"}
        assert set(ROWS[name]) <= set(record["rows"])
        assert not [row for row in record["rows"].values() if "error" in row]
    assert all(row["passed"] for row in made["right"]["rows"].values())
    assert made["right"]["left_out"]["host waits"] == "no CUDA device"
    assert made["right"]["rows"]["training step"]["step"] > 1e-4  # far above the rounding of the weights
    assert made["margins"]["rows"]["small-cnn refined float32"]["images_per_s"] > 0
    assert made["margins"]["rows"]["small-cnn refined bf16 compiled"]["graphs"] >= 2  # with gradients, and without
    for peer in ("foolbox", "adv-lib"):  # measured where it is installed, else named
        assert (f"small-cnn {peer}" in made["margins"]["rows"]) == (peer in made["margins"]["environment"]["peers"])
        assert f"small-cnn {peer}" in made["margins"]["rows"] | made["margins"]["left_out"]
    assert made["evaluation"]["rows"]["small-cnn standard"]["hours_for_10000_images"] > 0
    study = made["evidence"]["rows"]["study"]
    assert study["tasks_done"] == study["tasks"] > 5
    assert {row["strategy"] for row in study["results"]} == {"none", "uniform-eps", "puma", "easy", "random"}
    summary = (out / "summary.txt").read_text()
    assert summary in done.stdout
    assert [line.split()[0] for line in summary.splitlines() if not line.startswith(" ")] == list(STAGES)

    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.json")}
    again = run(out, "--toy")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("is finished") == len(STAGES)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.json")} == before
    assert (out / "summary.txt").read_text() == summary

    refused = run(out)  # real sizes into the folder of the toy ones
    assert refused.returncode == 1
    assert "made with --toy" in refused.stderr


def made_up(out: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        str(Path(__file__).with_name("made_up_gpu.py")),
        "--device",
        "cpu",
        "--out",
        str(out),
        *arguments,
    ]


def test_a_row_that_fails_ends_its_process_or_hangs_costs_only_itself(tmp_path: Path) -> None:
    done = subprocess.run(made_up(tmp_path, "--stages", "right"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    began, short = time.monotonic(), ["--stages", "margins", "--minutes", "0.3"]
    done = subprocess.run(made_up(tmp_path, *short), capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert time.monotonic() - began < 60  # the row that hangs would have taken five minutes
    files = [(tmp_path / f"{name}.json").read_text() for name in ("right", "margins")]
    right, margins = (
        json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is no JSON")) for text in files
    )
    assert right["rows"]["first"] == {"n": 1}
    assert right["rows"]["NaN"] == {"worst_difference": "inf", "allowed": 1e-3, "passed": False}
    assert right["rows"]["both NaN"]["passed"]
    assert right["rows"]["last"] == {"n": 2}
    assert "illegal memory access" in right["rows"]["broken"]["error"]
    assert right["left_out"] == {
        "killed": "its process ended",
        "absent": "No module named 'no_such_package' (--wheels)",
        "too long": "time limit",
    }
    assert right["status"] == "failed"
    assert (tmp_path / "measured.txt").read_text() == "first\n"  # not measured again by the processes that went on
    assert margins["rows"] == {"short": {"n": 4}}
    assert margins["left_out"] == {"long": "time limit"}
    assert margins["status"] == "time limit"
    assert "left out: its process ended" in (tmp_path / "summary.txt").read_text()

    again = subprocess.run(made_up(tmp_path, "--stages", "margins"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    margins = json.loads((tmp_path / "margins.json").read_text())
    assert margins["rows"] == {"short": {"n": 4}, "long": {"n": 3}}
    assert margins["left_out"] == {}
    assert margins["status"] == "finished"


def test_killed_it_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    process = subprocess.Popen(made_up(tmp_path, "--stages", "margins"), stdout=subprocess.DEVNULL)
    marker = tmp_path / "long.pid"
    for _ in range(600):
        if marker.exists() and marker.read_text():
            break
        time.sleep(0.1)
    stage = int(marker.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{stage}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{stage}").exists()
    assert json.loads((tmp_path / "margins.json").read_text())["rows"] == {"short": {"n": 4}}
    again = subprocess.run(made_up(tmp_path, "--stages", "margins"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((tmp_path / "margins.json").read_text())["status"] == "finished"


def test_packages_that_are_absent_are_named_with_the_way_to_carry_them() -> None:
    bare = [sys.executable, "-S", "-c", WITHOUT_PYDANTIC]
    said = subprocess.run(bare, capture_output=True, text=True, check=True).stdout
    assert "pydantic          is not here; rows of right training evidence are left out" in said
    assert "pip download" in said
    assert "pydantic-core annotated-types typing-inspection" in said
    assert "pillow" not in said  # it is here


WITHOUT_PYDANTIC = f"""
import sys, importlib.util
sys.path += {sys.path!r}
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pydantic" else find(name, *rest)
import gpu
print(gpu.how_to_carry(["right", "training"]))
"""


def test_agreement_and_training_run_on_a_pretended_cuda_device(tmp_path: Path) -> None:
    pretended = str(Path(__file__).with_name("pretend_cuda.py"))
    script = str(ROOT / "benchmarks" / "gpu.py")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    for name in ("right", "training"):  # the others make the same calls, and take minutes here
        command = [sys.executable, pretended, str(tmp_path), script, "--stage", name, "--device", "cuda", "--toy"]
        command += ["--out", str(tmp_path), "--until", str(time.monotonic() + 200)]
        command += ["--skip", "tests marked gpu"]  # a process of its own, in which nothing is pretended
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["environment"]["name"] == "pretended"
        assert not [row for row in record["rows"].values() if "error" in row], done.stdout
        assert record["status"] == "finished", done.stdout
    right = json.loads((tmp_path / "right.json").read_text())["rows"]
    assert right["host waits: pgd"]["host_waits"] == right["host waits: training step"]["host_waits"] == 0
    assert right["host waits: deepfool"]["host_waits"] > 0  # so they are seen
    training = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert "small-cnn bf16 compiled, CUDA graphs" in training
