"""The whole of `make gpu` on the CPU in toy sizes: its first run on a GPU is not its first run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
