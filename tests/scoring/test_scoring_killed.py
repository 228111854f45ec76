"""Killed workers, a full disk, several processes, a Ray cluster: always the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import puma
from puma.errors import StorageError
from puma.scoring import score_margins

OPTIONS = ["--part-rows", "100", "--batch-size", "50", "--mode", "deepfool", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def expected(weights: Path, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected")
    model, pool = puma.load_model(weights).eval(), puma.load_dataset("digits")
    score_margins(model, pool, out=out, part_rows=100, batch_size=50, mode="deepfool")
    return part_bytes(out)


def part_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def command(weights: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "puma", "score", str(weights), "digits", "--out", str(out), *OPTIONS, *more]


@pytest.mark.dist
def test_kill_9_at_random_moments_changes_no_byte(weights, expected, tmp_path) -> None:
    """Workers die one after the other, each as one of another number of workers; one alone makes the rest."""
    seed = 20
    chance = random.Random(seed)
    for workers in (3, 2):
        before = set(part_bytes(tmp_path))
        worker, wanted, delay = chance.randrange(workers), chance.randrange(1, 3), chance.random() * 0.1
        place = f"seed {seed}: worker {worker} of {workers}, killed {delay:.3f} s after {wanted} new parts"
        print(place)  # pytest shows it where the test fails
        victim = subprocess.Popen(
            command(weights, tmp_path, "--worker", str(worker), "--num-workers", str(workers)),
            stdout=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 200
            while victim.poll() is None and time.monotonic() < deadline:
                if len(set(part_bytes(tmp_path)) - before) >= wanted:
                    time.sleep(delay)
                    break
                time.sleep(0.005)
        finally:
            victim.kill()
            victim.wait()
        assert victim.returncode == -signal.SIGKILL, f"{place}: it ended before"
        found = part_bytes(tmp_path)
        assert before < set(found) < set(expected), place
        assert all(expected[name] == data for name, data in found.items()), place
    model, pool = puma.load_model(weights).eval(), puma.load_dataset("digits")
    assert len(score_margins(model, pool, out=tmp_path, part_rows=100, batch_size=50, mode="deepfool")) == 898
    assert part_bytes(tmp_path) == expected


@pytest.mark.dist
def test_devices_share_the_work(weights, expected, tmp_path) -> None:
    config = tmp_path / "score.toml"
    config.write_text("devices = 2\n")
    done = subprocess.run(
        command(weights, tmp_path / "table", "--config", str(config)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert part_bytes(tmp_path / "table") == expected


@pytest.mark.dist
def test_slurm_and_torchrun_variables_choose_the_parts(weights, expected, tmp_path) -> None:
    environment = os.environ | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    done = subprocess.run(command(weights, tmp_path), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(part_bytes(tmp_path)) == [f"part-{part:06d}.parquet" for part in (1, 5)]
    assert all(expected[name] == data for name, data in part_bytes(tmp_path).items())


@pytest.mark.dist
def test_a_full_disk_keeps_what_was_finished(weights, expected, tmp_path) -> None:
    """On a tmpfs of a few pages, where root may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    model, pool = puma.load_model(weights).eval(), puma.load_dataset("digits")
    try:
        with pytest.raises(StorageError, match="no space left") as caught:
            score_margins(model, pool, out=small / "t", part_rows=100, batch_size=50, mode="deepfool")
        assert caught.value.exit_code == 6
        finished = part_bytes(small / "t")
        assert finished
        assert all(expected[name] == data for name, data in finished.items())
        shutil.copytree(small / "t", tmp_path / "moved")
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)  # the error still holds its file open
    score_margins(model, pool, out=tmp_path / "moved", part_rows=100, batch_size=50, mode="deepfool")
    assert part_bytes(tmp_path / "moved") == expected


@pytest.mark.dist
def test_a_ray_cluster_survives_a_killed_worker(weights, tmp_path_factory, tmp_path) -> None:
    """A real local cluster; the first worker process that runs a task is killed with its task, one of many."""
    pytest.importorskip("ray")
    import psutil

    single = tmp_path_factory.mktemp("single")
    model, pool = puma.load_model(weights).eval(), puma.load_dataset("digits")
    score_margins(model, pool, out=single, part_rows=10, batch_size=10, mode="tight")
    expected = part_bytes(single)
    many = ["--engine", "ray", "--part-rows", "10", "--batch-size", "10", "--mode", "tight"]  # the last one counts
    run = subprocess.Popen(command(weights, tmp_path, *many), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = 0
    deadline = time.monotonic() + 240
    while run.poll() is None and not killed and time.monotonic() < deadline:
        if part_bytes(tmp_path):
            killed = kill_one_task(psutil.Process(run.pid))
        time.sleep(0.02)
    out, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    assert killed
    assert "898 images scored" in out
    assert part_bytes(tmp_path) == expected


def kill_one_task(driver) -> int:
    """Kill one Ray worker that is at a task (they call themselves ``ray::_ray_task``)."""
    import psutil

    for process in driver.children(recursive=True):
        try:
            if "ray::_ray_task" in " ".join(process.cmdline()):
                process.kill()
                return process.pid
        except psutil.NoSuchProcess:
            continue
    return 0
