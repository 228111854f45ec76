"""Exports load by themselves, in a fresh process and by other libraries, with the same logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from randomised_model import randomised
from safetensors.torch import load_file
from torch import nn

import puma.export.proof as proof
from puma.errors import CheckError, DataError, ModelError, StorageError, UsageError
from puma.export import Claim, Paper, export_hub, export_robustbench
from puma.export.network import robustbench_config, standalone_config
from puma.export.standalone import build
from puma.models.build import build_model
from puma.models.weights import weights_sha256

PAPER = Paper(
    "Data pruning in adversarial training", authors="A. Author, B. Author", footnote="It uses 1M synthetic images."
)
NAME = "Author2026Data_WRN-10-1"


def claim_for(model: nn.Module, **changes: Any) -> Claim:
    value = {
        "threat": {"norm": "Linf", "eps": 8 / 255},
        "attack": "standard",
        "clean_accuracy": 0.924412,
        "clean_interval": [0.919, 0.929],
        "n_clean": 10_000,
        "attacked_accuracy": 0.6731,
        "robust_interval": [0.664, 0.682],
        "n_test": 10_000,
        "warnings": [],
        "settings": {"model": weights_sha256(model), "seed": 0},
        "environment": {"pyautoattack": "0.2.0"},
    }
    return Claim.of({**value, **changes})


NETWORKS: dict[str, dict[str, Any]] = {
    "small-cnn": {"name": "small-cnn", "num_classes": 10, "in_channels": 1, "image_size": 8},
    "small-cnn-group": {
        "name": "small-cnn",
        "num_classes": 7,
        "in_channels": 3,
        "image_size": 28,
        "norm": "group",
        "activation": "relu",
        "widths": (8, 16, 24),
    },
    "wrn-same": {"name": "wrn-10-2", "num_classes": 10},
    "wrn-symmetric": {"name": "wrn-16-1", "num_classes": 5, "padding": "symmetric", "activation": "relu"},
    "preactresnet": {"name": "preactresnet-18", "num_classes": 10},
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_standalone_network_computes_the_same(options: dict[str, Any]) -> None:
    model = randomised(build_model(**options))
    copy = build(standalone_config(model)).eval()
    copy.load_state_dict(model.state_dict(), strict=True)
    size, channels = model.config["image_size"], model.config["in_channels"]
    images = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(copy(images), model(images), rtol=1e-6, atol=1e-6)


def plain_wrn() -> nn.Module:
    options = {"padding": "symmetric", "activation": "relu", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return randomised(build_model("wrn-10-1", 10, **options))


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["DMWideResNet", "WideResNet"])
def test_robustbench_folder(tmp_path: Path, kind: str) -> None:
    model = plain_wrn() if kind == "WideResNet" else randomised(build_model("wrn-10-1", 10))
    out = export_robustbench(model, tmp_path / "out", name=NAME, claim=claim_for(model), paper=PAPER)
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
    first = "init_conv.weight" if kind == "DMWideResNet" else "block1.layer.0.conv1.weight"
    assert first in weights
    assert not {"mean", "std"} & weights.keys()
    assert not any("module." in key or "model." in key for key in weights)  # RobustBench's loader cuts these out
    card = (out / "README.md").read_text()
    assert f"{kind}(" in card
    assert "| AutoAttack standard, Linf:8/255 | 67.31 % | 66.40 to 68.20 | 10,000 |" in card
    assert "Robust accuracy: 67.31 %" in (out / "new_model_issue.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_robustbench_keys_of_wrn_28_10() -> None:
    with torch.device("meta"):
        model = build_model("wrn-28-10", 10)
    architecture, arguments, _, _ = robustbench_config(model.to_empty(device="cpu"))
    assert architecture == "DMWideResNet"
    assert arguments["depth"] == 28
    assert arguments["width"] == 10
    assert arguments["activation_fn"] == "SiLU"


@pytest.mark.dist
def test_hub_folder(tmp_path: Path) -> None:
    model = randomised(build_model("small-cnn", 10, in_channels=1, image_size=8))
    claim = claim_for(model, n_test=400, attack="standard")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"settings": {"threat": "Linf:0.2", "recipe.steps": 500, "seed": 3}}))
    out = export_hub(model, tmp_path / "hub", paper=PAPER, dataset="digits", claim=claim, run=run)
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.py", "model.safetensors"}
    assert load_file(out / "model.safetensors").keys() == model.state_dict().keys()
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "400 (stratified subset)" in card
    assert "- steps: 500" in card
    unclaimed = export_hub(model, tmp_path / "bare", paper=PAPER)
    assert "nothing is claimed" in (unclaimed / "README.md").read_text()


@pytest.mark.dist
def test_hub_folder_loads_through_the_hubs_own_mixin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = randomised(build_model("wrn-10-1", 10))
    out = export_hub(model, tmp_path / "hub", paper=PAPER)
    monkeypatch.syspath_prepend(out)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    import model as exported

    class Shared(exported.WideResNet, hub.PyTorchModelHubMixin): ...

    loaded = Shared.from_pretrained(out).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-6, atol=1e-6)
    monkeypatch.delitem(sys.modules, "model")


class Own(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"n_test": 400}, DataError, "judged 400 of 10,000"),
        ({"attack": "pgd-20"}, DataError, "the evaluation is pgd-20"),
        ({"settings": {"model": "0" * 64, "seed": 0}}, DataError, "of other weights"),
    ],
)
def test_claims_that_robustbench_would_not_list(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build_model("wrn-10-1", 10)
    with pytest.raises(error, match=message):
        export_robustbench(model, tmp_path / "out", name=NAME, claim=claim_for(model, **changes), paper=PAPER)
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path: Path) -> None:
    model = build_model("small-cnn", 10, in_channels=1, image_size=8)
    with pytest.raises(ModelError, match="RobustBench has no class"):
        export_robustbench(model, tmp_path / "a", name=NAME, claim=claim_for(model), paper=PAPER)
    with pytest.raises(UsageError, match="model's id"):
        export_robustbench(model, tmp_path / "a", name="../x", claim=claim_for(model), paper=PAPER)
    with pytest.raises(ModelError, match="Own cannot be exported"):
        export_hub(Own(), tmp_path / "a", paper=PAPER)
    with pytest.raises(UsageError, match="no single line"):
        Paper("two\nlines")
    with pytest.raises(DataError, match=r"evaluation\.json"):
        Claim.of({"attack": "standard"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(StorageError, match="is not empty"):
        export_hub(model, tmp_path / "full", paper=PAPER)
    assert (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.dist
def test_an_export_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("small-cnn", 10, in_channels=1, image_size=8)
    other = build_model("small-cnn", 10, in_channels=1, image_size=8, seed=1)
    honest = proof.prove
    monkeypatch.setattr("puma.export.hub.prove", lambda _, folder, config: honest(other, folder, config))
    with pytest.raises(CheckError, match="gives other logits"):
        export_hub(model, tmp_path / "out", paper=PAPER)
    assert not list(tmp_path.iterdir())


@pytest.mark.dist
def test_proof_measures_the_gap(tmp_path: Path) -> None:
    model = randomised(build_model("small-cnn", 10, in_channels=1, image_size=8))
    out = export_hub(model, tmp_path / "out", paper=PAPER)
    config = json.loads((out / "config.json").read_text())
    assert proof.prove(model, out, config) <= 1e-6
    (out / "model.py").write_text((out / "model.py").read_text() + "\nimport puma\n")
    with pytest.raises(CheckError, match="does not load by itself") as caught:
        proof.prove(model, out, config)
    assert "needs puma" in caught.value.why
