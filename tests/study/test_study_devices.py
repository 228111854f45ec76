"""Where a study computes: everything on the GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_study import small_study
from torch import nn

from puma.study.runner import work
from puma.study.stages import load_pool

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
    monkeypatch.setattr("puma.study.stages.resolve_device", lambda name: GPU)
    for engine in ("stages.evaluate", "stages.mislabelled_shares", "stages.generate"):
        watched(f"puma.study.{engine}")
    for engine in ("score_margins", "score_run", "embed"):
        watched(f"puma.study.stages.{engine}")
    work(small_study(tmp_path, grid=[{"strategies": ["dedup"], "prune_fractions": [0.5]}]))
    assert sorted(seen) == sorted(
        ["generate", *["score_margins"] * 2, "score_run", "embed", "evaluate", "mislabelled_shares"]
    )


def test_images_are_decoded_once_for_all_tasks_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PUMA_CACHE", str(tmp_path / "cache"))
    for label in ("cat", "dog"):
        (folder := tmp_path / "real" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (6, 6), (number, 7, 0)).save(folder / f"{number}.png")
    pool = {"real": str(tmp_path / "real"), "test": "digits:test", "synthetic": []}
    study = small_study(tmp_path, pool=pool)
    first, second = load_pool(study, 0), load_pool(study, 0)  # as two processes, or two tasks, would
    assert (first.read([3, 4])[:, 0, 0, 0] == [3, 0]).all()
    assert (second.read([3, 4]) == first.read([3, 4])).all()
    assert caplog.text.count("decoding") == 1
    assert [file.stat().st_size for file in (tmp_path / "cache" / "images").glob("*.raw")] == [8 * 6 * 6 * 3]
