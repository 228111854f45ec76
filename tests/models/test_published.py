"""Published models by name: read without running code, and used as margin models from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import puma
from puma.cli.app import main
from puma.errors import ModelError, UsageError
from puma.models.zoo import resolve_model, to_robustbench


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUMA_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def publish(folder: Path, name: str, model: nn.Module) -> Path:
    """A file as RobustBench keeps it: its own keys below ``state_dict``, from a model in DataParallel."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = to_robustbench(model).weights
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, folder / f"{name}.pt")
    return folder / f"{name}.pt"


def network(name: str, classes: int = 10, **options) -> nn.Module:
    """A small network whose running statistics are not those of a fresh one."""
    model = puma.build_model(name, classes, **options)
    model.train()
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return model.eval()


CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


@pytest.mark.parametrize(
    ("name", "classes", "options"),
    [
        ("wrn-10-1", 10, {"activation": "silu"}),
        ("wrn-16-2", 100, {"activation": "silu", **CIFAR100}),
        ("preactresnet-18", 10, {"activation": "silu"}),
    ],
)
def test_a_file_of_robustbench_says_what_network_it_is(models: Path, name: str, classes: int, options) -> None:
    model = network(name, classes, **options)
    publish(models / "cifar10" / "Linf", "Me2026Model", model)
    found = resolve_model("robustbench:Me2026Model")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(images), rtol=0, atol=1e-6)
    assert not found.training


def test_a_published_robust_model_is_a_margin_model(models: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    publish(models / "cifar10" / "Linf", "Wang2023Better_WRN-10-1", network("wrn-10-1", activation="silu"))
    rng = np.random.default_rng(0)
    data = {"image": rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8), "label": np.arange(30) % 10}
    np.savez(tmp_path / "images.npz", **data)
    words = ["score", "robustbench:Wang2023Better_WRN-10-1", tmp_path / "images.npz", "--out", tmp_path / "margins"]
    words += ["--threat", "Linf:8/255", "--device", "cpu", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["puma", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    table = puma.MarginTable.read(tmp_path / "margins")
    assert len(table) == 30
    assert (table.status <= 2).all()
    assert "30 images scored (Linf, refined)" in capsys.readouterr().out


def test_files_that_cannot_be_used_are_named(models: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no Nobody2026\.pt in ") as caught:
        resolve_model("robustbench:Nobody2026")
    assert "load_model('Nobody2026')" in caught.value.fix
    model = network("wrn-10-1", activation="silu")
    for norm in ("Linf", "L2"):
        publish(models / "cifar10" / norm, "Both2026", model)
    with pytest.raises(ModelError, match="several files") as caught:
        resolve_model("robustbench:Both2026")
    assert "robustbench:cifar10/Linf/Both2026" in caught.value.fix
    assert resolve_model("robustbench:cifar10/L2/Both2026").config["name"] == "wrn-10-1"
    torch.save(nn.Linear(3, 2).state_dict(), models / "Other2026.pt")
    with pytest.raises(ModelError, match="Other2026 is not a network that is known here"):
        resolve_model("robustbench:Other2026")
    (models / "Broken2026.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ModelError, match=r"cannot read .*Broken2026\.pt"):
        resolve_model("robustbench:Broken2026")


class Runs:
    def __reduce__(self):
        return (Path("ran").touch, ())


def test_nothing_in_a_file_is_executed(models: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    models.mkdir()
    torch.save({"state_dict": Runs()}, models / "Evil2026.pt")
    with pytest.raises(ModelError, match=r"cannot read .*Evil2026\.pt"):
        resolve_model("robustbench:Evil2026")
    assert not (tmp_path / "ran").exists()


def test_packages_give_their_models_with_the_normalisation_inside(monkeypatch, tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    inner.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    asked: list[tuple[str, object]] = []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        return inner

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    images = torch.rand(2, 3, 2, 2)
    model = resolve_model("timm:tiny")
    puma.models.weights.save_tensors(model.state_dict(), tmp_path / "run" / "last.safetensors", "puma.model/1", {})
    assert torch.equal(resolve_model("timm:tiny", tmp_path / "run")(images), model(images))
    torch.testing.assert_close(model(images), inner((images - 0.5) / 0.25))
    assert asked == [("tiny", True), ("tiny", False)]
    with pytest.raises(ModelError, match="timm has no model 'huge' here"):
        resolve_model("timm:huge")

    package = ModuleType("torchvision")
    package.models = SimpleNamespace(get_model=lambda name, weights: inner)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", package.models)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(resolve_model("torchvision:tiny")(images), inner((images - mean) / std))

    ours = puma.build_model("small-cnn", 10, in_channels=1, image_size=8)
    puma.models.weights.save_model(ours.eval(), tmp_path / "model.safetensors")
    hub = SimpleNamespace(hf_hub_download=lambda repo, file: str(tmp_path / file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_model("hf:me/model").config == ours.config


@pytest.mark.parametrize(
    ("spec", "fix"), [("timm:x", "pip install timm"), ("torchvision:x", "pip install torchvision")]
)
def test_a_missing_package_is_named(monkeypatch, spec: str, fix: str) -> None:
    for name in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="is not installed") as caught:
        resolve_model(spec)
    assert caught.value.fix == fix


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_package_that_does_not_fit_this_torch_is_named(monkeypatch, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in (name, f"{name}.models"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UsageError, match=f"{name} cannot be imported") as caught:
        resolve_model(f"{name}:resnet18")
    assert "nms does not exist" in caught.value.why
    assert caught.value.fix == "pip install --upgrade torch torchvision"
