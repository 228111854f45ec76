"""What the last bits depend on besides the settings: recorded by everything that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from puma.devices import environment
from puma.training.recipe import load_recipe
from puma.training.run import open_folder

CPU = torch.device("cpu")


def test_the_vector_instructions_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9000")
    assert environment(CPU)["processor"] == "AVX9000"
    assert environment(CPU)["processor"] == "AVX9000"


def test_a_run_names_another_processor_and_says_nothing_of_what_it_does_not_know(tmp_path: Path) -> None:
    settings, now = (load_recipe("digits"), {"seed": 0}), environment(CPU)
    assert open_folder(tmp_path, *settings, now) == []
    assert open_folder(tmp_path, *settings, now | {"processor": "AVX9000"}) == [
        f"processor: {now['processor']!r} there, 'AVX9000' now"
    ]
    record = json.loads((tmp_path / "run.json").read_text())
    del record["environment"]["processor"], record["checksum"]  # as earlier versions wrote it
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert open_folder(tmp_path, *settings, now) == []
