"""Exports are read back with the same logits, and say what was measured."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from randomised_model import randomised
from safetensors.torch import load_file
from torch import nn

import puma.export
from puma import load_model
from puma.errors import CheckError, DataError, ModelError, StorageError, UsageError
from puma.evaluation import Evaluation
from puma.export import Paper, export_hub, export_robustbench
from puma.models.networks import build_model
from puma.models.weights import weights_sha256
from puma.models.zoo import resolve_model
from puma.threat import ThreatModel

PAPER = Paper(
    "Data pruning in adversarial training", authors="A. Author, B. Author", footnote="It uses 1M synthetic images."
)
NAME = "Author2026Data_WRN-10-1"


def evaluation_of(
    model: nn.Module, attack: str = "standard", attacked: int = 10_000, sha256: str | None = None
) -> Evaluation:
    """10,000 test images: 92.44 % clean; of the first ``attacked``, 67.31 % robust."""
    rows = np.arange(10_000)
    robust, clean = rows % attacked < 0.6731 * attacked, rows < 9_244
    meta = {
        "settings": {"model": sha256 or weights_sha256(model), "seed": 0},
        "environment": {"pyautoattack": "0.2.0"},
        "warnings": [],
        "log": [],
    }
    broken_by = np.where(clean, np.where(robust | (rows >= attacked), None, "square"), "clean")
    label = np.zeros(10_000, np.int64)
    return Evaluation(ThreatModel("Linf", 8 / 255), attack, label, rows < attacked, broken_by, meta)


def small_cnn(seed: int = 0) -> nn.Module:
    return randomised(build_model("small-cnn", 10, in_channels=1, image_size=8, seed=seed))


def test_robustbench_folder(tmp_path: Path) -> None:
    model = randomised(build_model("wrn-10-1", 10))
    out = export_robustbench(model, tmp_path / "out", name=NAME, evaluation=evaluation_of(model), paper=PAPER)
    info = json.loads((out / "model_info" / "cifar10" / "Linf" / f"{NAME}.json").read_text())
    assert info == {
        "link": "https://arxiv.org/abs/2405.06298",
        "name": PAPER.name,
        "authors": "A. Author, B. Author",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "Unpublished",
        "architecture": "WideResNet-10-1",
        "eps": "8/255",
        "clean_acc": "92.44",
        "reported": "67.31",
        "autoattack_acc": "67.31",
        "footnote": "It uses 1M synthetic images.",
        "unreliable": False,
    }
    weights = torch.load(out / f"{NAME}.pt", weights_only=True)
    assert "init_conv.weight" in weights
    assert not {"mean", "std"} & weights.keys()
    assert not any("module." in key or "model." in key for key in weights)  # RobustBench's loader cuts these out
    card = (out / "README.md").read_text()
    assert "DMWideResNet(" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_hub_folder(tmp_path: Path) -> None:
    model, run = small_cnn(), tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"settings": {"threat": "Linf:0.2", "recipe.steps": 500, "seed": 3}}))
    subset = evaluation_of(model, attacked=400)
    out = export_hub(model, tmp_path / "hub", paper=PAPER, dataset="digits", evaluation=subset, run=run)
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert load_file(out / "model.safetensors").keys() == model.state_dict().keys()
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_model(out / "model.safetensors")(images), model(images), rtol=0, atol=0)
    card = (out / "README.md").read_text()
    assert "on a stratified subset of 400 of 10,000 images" in card
    assert "- steps: 500" in card
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["library_name"], front["datasets"]) == ("apache-2.0", "puma-robust", ["digits"])
    (claimed,) = front["model-index"][0]["results"]
    assert [metric["value"] for metric in claimed["metrics"]] == [0.9244, 0.675]
    full = export_hub(model, tmp_path / "full", paper=PAPER, evaluation=evaluation_of(model))
    accuracy = "robust accuracy (AutoAttack standard) at Linf:8/255 67.31%"
    line = f"- {accuracy} (95 % interval 66.4% to 68.2%) on 10,000 images"
    assert line in (full / "README.md").read_text()
    unclaimed = export_hub(model, tmp_path / "bare", paper=PAPER)
    assert "Not evaluated." in (unclaimed / "README.md").read_text()


class Own(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"mean": (0.3, 0.4, 0.5)}, {"num_classes": 100}])
def test_a_robustbench_file_is_read_back_as_the_network_it_is(tmp_path: Path, monkeypatch, options) -> None:
    """Neither the activation nor the normalisation is among its weights."""
    model = randomised(build_model("wrn-10-1", **{"num_classes": 10, **options}))
    export_robustbench(model, tmp_path / "models", name=NAME, evaluation=evaluation_of(model), paper=PAPER)
    monkeypatch.setenv("PUMA_MODELS", str(tmp_path / "models"))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(resolve_model(f"robustbench:{NAME}")(images), model(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacked": 400}, "was run on 400 of 10,000"),
        ({"attack": "pgd-20"}, "the evaluation is pgd-20"),
        ({"sha256": "0" * 64}, "of other weights"),
    ],
)
def test_evaluations_that_robustbench_would_not_list(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = build_model("wrn-10-1", 10)
    with pytest.raises(DataError, match=message):
        export_robustbench(model, tmp_path / "out", name=NAME, evaluation=evaluation_of(model, **changes), paper=PAPER)
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path: Path) -> None:
    model = small_cnn()
    with pytest.raises(ModelError, match="RobustBench has no class"):
        export_robustbench(model, tmp_path / "a", name=NAME, evaluation=evaluation_of(model), paper=PAPER)
    with pytest.raises(UsageError, match="model's id"):
        export_robustbench(model, tmp_path / "a", name="../x", evaluation=evaluation_of(model), paper=PAPER)
    with pytest.raises(ModelError, match="Own cannot be exported"):
        export_hub(Own(), tmp_path / "a", paper=PAPER)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(StorageError, match="is not empty"):
        export_hub(model, tmp_path / "full", paper=PAPER)
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_without_the_hub_library_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        export_hub(small_cnn(), tmp_path / "out", paper=PAPER)
    assert caught.value.fix == 'pip install "puma-robust[hub]"'
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puma.export, "load_model", lambda path: small_cnn(seed=1))
    with pytest.raises(CheckError, match="gives other logits"):
        export_hub(build_model("small-cnn", 10, in_channels=1, image_size=8), tmp_path / "out", paper=PAPER)
    assert not list(tmp_path.iterdir())


def test_two_exports_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find the folder empty; the first to finish has it, the other leaves nothing behind."""
    both, honest = threading.Barrier(2), puma.export.load_model

    def together(path: Path) -> nn.Module:
        both.wait(60)
        return honest(path)

    monkeypatch.setattr(puma.export, "load_model", together)
    outcomes: list[object] = []

    def run(seed: int) -> None:
        try:
            outcomes.append(export_hub(small_cnn(seed), tmp_path / "out", paper=PAPER))
        except StorageError as error:
            outcomes.append(error.what)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(str(outcome) for outcome in outcomes) == [str(tmp_path / "out"), f"{tmp_path / 'out'} is not empty"]
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(puma.export, "write_json", full)
    with pytest.raises(StorageError, match="no space left"):
        export_hub(small_cnn(), tmp_path / "out", paper=PAPER)
    assert not list(tmp_path.iterdir())
