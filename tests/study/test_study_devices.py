"""Where a study computes: everything on the GPU if there is one, and each worker on its own if there are several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import small_study
from torch import nn

from puma.study.queue import work
from puma.study.workers import run_workers

GPU = torch.device("cpu", 0)  # a CPU under another name: computes here, and is told apart from "cpu"


def test_every_engine_gets_its_networks_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine of a study is watched: the networks it is given were moved, or it is told the device."""
    moved: set[int] = set()
    seen: list[str] = []
    to = nn.Module.to

    def moving(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        if arguments and str(arguments[0]) == str(GPU):
            moved.add(id(module))
        return to(module, *arguments, **options)

    def watched(place: str) -> None:
        name = place.rpartition(".")[2]
        engine: Callable[..., Any] = getattr(__import__(place.rpartition(".")[0], fromlist=[name]), name)

        def run(*arguments: Any, **options: Any) -> Any:
            networks = [value for value in arguments if isinstance(value, nn.Module)]
            assert networks or str(options.get("device")) == str(GPU), f"{name} was told no device"
            assert all(id(network) in moved for network in networks), f"{name} got a network that was not moved"
            seen.append(name)
            return engine(*arguments, **options)

        monkeypatch.setattr(place, run)

    monkeypatch.setattr(nn.Module, "to", moving)
    monkeypatch.setattr("puma.study.materials.resolve_device", lambda name: GPU)
    for engine in ("cells.evaluate", "cells.mislabelled_share", "materials.generate"):
        watched(f"puma.study.{engine}")
    for engine in ("score_margins", "score_run", "embed"):
        watched(f"puma.study.margins.{engine}")
    work(small_study(tmp_path, grid=[{"strategies": ["dedup"], "prune_fractions": [0.5]}]))
    assert sorted(seen) == sorted(
        ["generate", *["score_margins"] * 2, "score_run", "embed", "evaluate", "mislabelled_share"]
    )


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (0, None, [None, None, None]),
        (1, "3", ["3", "3", "3"]),  # as it is
        (2, None, ["0", "1", "0"]),
        (2, "5, GPU-8a7b", ["5", "GPU-8a7b", "5"]),
        (1, "2,-1,3", ["2,-1,3"] * 3),  # CUDA reads no further than the -1
        (0, "", ["", "", ""]),
    ],
)
def test_each_worker_gets_one_of_several_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, expected: list[str | None]
) -> None:
    started: list[str | None] = []

    class Process:
        returncode, stderr = 0, ()

        def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
            started.append(env.get("CUDA_VISIBLE_DEVICES"))

        def poll(self) -> int:
            return 0

        def wait(self, timeout: float) -> int:
            return 0

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr("puma.study.workers.subprocess.Popen", Process)
    assert run_workers(small_study(tmp_path), jobs=3, show=False)
    assert started == expected
