"""Published models by name: read without running code, and used as margin models from the command line."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import puma
from puma.cli.app import main
from puma.errors import ModelError, UsageError
from puma.models.zoo import resolve_model, to_robustbench
from puma.training.recipe import load_recipe
from puma.training.run import Run


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
    assert f"load_model('Nobody2026', '{models}', 'cifar10', 'Linf')" in caught.value.fix
    with pytest.raises(ModelError) as caught:
        resolve_model("robustbench:cifar100/L2/Nobody2026")
    assert "'cifar100', 'L2')" in caught.value.fix
    model = network("wrn-10-1", activation="silu")
    for norm in ("Linf", "L2"):
        publish(models / "cifar10" / norm, "Both2026", model)
    with pytest.raises(ModelError, match="several files") as caught:
        resolve_model("robustbench:Both2026")
    assert "robustbench:cifar10/Linf/Both2026" in caught.value.fix
    assert resolve_model("robustbench:cifar10/L2/Both2026").config["name"] == "wrn-10-1"
    with pytest.raises(ModelError, match="there is no Bot2026") as caught:
        resolve_model("robustbench:Bot2026")
    assert caught.value.fix == "did you mean robustbench:Both2026?"
    sparse = {**to_robustbench(model).weights, "layer.0.block.0.threshold": torch.ones(1)}  # as of MeanSparse's class
    for weights in (nn.Linear(3, 2).state_dict(), sparse):
        torch.save(weights, models / "Other2026.pt")
        with pytest.raises(ModelError, match="Other2026 is not a network that is known here") as caught:
            resolve_model("robustbench:Other2026")
        assert f"net = lambda: load_model('Other2026', '{models}', 'cifar10', 'Linf')" in caught.value.fix
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


class Stand(nn.Module):
    """A network as torchvision and timm build them: 1,000 classes unless told otherwise, random weights."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)), nn.Linear(5, num_classes)
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "input_size": (3, 2, 2)}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(images))


class OfTensorFlow(Stand):
    """As torchvision's GoogLeNet and Inception: weights of TensorFlow, and a second head for another loss."""

    transform_input = False

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__(num_classes)
        self.aux1 = nn.Linear(5, num_classes)
        self.fc = self._modules.pop("fc")  # the last layer, as there

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images * 2 if self.transform_input else images)


PRESET = SimpleNamespace(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_size=[2])
ASKED: list[tuple[str, object]] = []


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for timm and torchvision, which need not be installed."""

    def create_model(name: str, pretrained: bool, **classes: int) -> nn.Module:
        ASKED.append((name, pretrained))
        if pretrained and name == "remote":
            raise OSError("no network\nand more")
        return Stand(**classes)

    def get_model(name: str, weights: str | None, **classes: int) -> nn.Module:
        return (
            create_model(name, weights is not None)
            if weights
            else {"inception": OfTensorFlow}.get(name, Stand)(**classes)
        )

    names = ["tiny", "remote", "inception"]
    timm = SimpleNamespace(create_model=create_model, list_models=lambda: names, is_model=names.__contains__)
    models = SimpleNamespace(
        get_model=get_model,
        list_models=lambda module: names,
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: PRESET)),
    )
    package = ModuleType("torchvision")
    package.models = models
    for name, module in {"timm": timm, "torchvision": package, "torchvision.models": models}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # restored when the test ends
    ASKED.clear()


def normalised(inner: nn.Module, images: torch.Tensor, mean=PRESET.mean, std=PRESET.std) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return inner.eval()((images - mean) / std)


IMAGES = torch.rand(2, 3, 2, 2)


@pytest.mark.usefixtures("packages")
def test_packages_give_their_models_with_the_normalisation_inside(tmp_path: Path) -> None:
    for package, usual in {"timm": ((0.5,) * 3, (0.25,) * 3), "torchvision": (PRESET.mean, PRESET.std)}.items():
        model = resolve_model(f"{package}:tiny")
        assert not model.training
        torch.testing.assert_close(model(IMAGES), normalised(model.model, IMAGES, *usual))
        puma.models.weights.save_tensors(model.state_dict(), tmp_path / package / "last.safetensors", "x/1", {})
        assert torch.equal(resolve_model(f"{package}:tiny", tmp_path / package)(IMAGES), model(IMAGES))
    assert ASKED[:2] == [("tiny", True), ("tiny", False)]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_the_weights_say_how_many_classes_there_are(tmp_path: Path, package: str, caplog) -> None:
    tuned = Stand(7)
    layouts: list[dict[str, Any]] = [
        {"state_dict": {f"module.{key}": value for key, value in tuned.state_dict().items()}},
        {"net": tuned.state_dict(), "acc": np.float64(0.9), "epoch": np.int64(3)},
        # of torchvision's own training script
        {"model": tuned.state_dict(), "model_ema": {"n_averaged": torch.ones(1)}, "args": Namespace(lr=0.1)},
    ]
    for number, content in enumerate(layouts):
        torch.save(content, tmp_path / f"{number}.pt")
        model = resolve_model(f"{package}:tiny", tmp_path / f"{number}.pt")
        usual = ((0.5,) * 3, (0.25,) * 3) if package == "timm" else (PRESET.mean, PRESET.std)
        torch.testing.assert_close(model(IMAGES), normalised(tuned, IMAGES, *usual))
    assert [record.args[1] for record in caplog.records if "averaged weights" in record.msg] == ["model_ema"]


@pytest.mark.usefixtures("packages")
def test_a_model_of_tensorflow_is_what_its_package_makes_of_published_weights(tmp_path: Path) -> None:
    theirs = OfTensorFlow()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    theirs.transform_input = True  # what the package sets where it loads the weights itself
    model = resolve_model("torchvision:inception", tmp_path / "w.pth")
    torch.testing.assert_close(model(IMAGES), normalised(theirs, IMAGES))
    assert not [key for key in model.state_dict() if "aux" in key]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_new_head_gives_a_published_model_the_classes_of_the_data(tmp_path: Path, package: str) -> None:
    torch.save(Stand(7).state_dict(), tmp_path / "7.pt")
    for weights in (None, tmp_path / "7.pt"):
        one, two = (resolve_model(f"{package}:tiny", weights, new_head=True, num_classes=4, seed=1) for _ in range(2))
        assert one(IMAGES).shape == (2, 4)
        assert torch.equal(one.model.fc.weight, two.model.fc.weight)  # each process that trains builds it anew
    given = torch.load(tmp_path / "7.pt", weights_only=True)
    assert torch.equal(one.model.body[1].weight, given["body.1.weight"])


def test_new_head_of_a_run_or_a_model_of_robustbench(models: Path, tmp_path: Path) -> None:
    model = network("wrn-10-1", activation="silu")
    publish(models, "Me2026Model", model)
    puma.models.weights.save_model(model, tmp_path / "run" / "last.safetensors")
    for spec in ("robustbench:Me2026Model", tmp_path / "run", tmp_path / "run" / "last.safetensors"):
        found = resolve_model(spec, new_head=True, num_classes=3, in_channels=3, image_size=32, seed=2)
        assert found(torch.rand(2, 3, 32, 32)).shape == (2, 3)
        assert found.config["num_classes"] == 3
        assert torch.equal(found.init_conv.weight, model.init_conv.weight)


@pytest.mark.usefixtures("packages")
def test_new_head_is_new_where_the_weights_are_for_as_many_classes(tmp_path: Path) -> None:
    torch.save(Stand(4).state_dict(), tmp_path / "4.pt")
    for weights, classes in ((None, 1000), (tmp_path / "4.pt", 4)):
        old = resolve_model("timm:tiny", weights, seed=1)
        new = resolve_model("timm:tiny", weights, new_head=True, num_classes=classes, seed=2)
        assert new.model.fc.weight.shape == old.model.fc.weight.shape
        assert not torch.equal(new.model.fc.weight, old.model.fc.weight)
    ours = network("wrn-10-1", 4)
    puma.models.weights.save_model(ours, tmp_path / "ours.safetensors")
    sizes = {"num_classes": 4, "in_channels": 3, "image_size": 32, "seed": 5}
    for spec, weights in (("wrn-10-1", tmp_path / "ours.safetensors"), (tmp_path / "ours.safetensors", None)):
        new = resolve_model(spec, weights, new_head=True, **sizes)
        assert torch.equal(new.logits.weight, puma.build_model("wrn-10-1", **sizes).logits.weight)
        assert torch.equal(new.init_conv.weight, ours.init_conv.weight)


@pytest.mark.usefixtures("packages")
def test_a_model_that_returns_features_is_refused_until_it_has_a_head(monkeypatch) -> None:
    class Features(Stand):
        def __init__(self, num_classes: int = 0) -> None:
            super().__init__(num_classes or 5)
            self.num_classes = num_classes
            self.fc = self.fc if num_classes else nn.Identity()

    monkeypatch.setattr(sys.modules["timm"], "create_model", lambda name, pretrained, **classes: Features(**classes))
    with pytest.raises(ModelError, match="timm:tiny is made for features: it has no classes"):
        resolve_model("timm:tiny")
    assert resolve_model("timm:tiny", new_head=True, num_classes=3)(IMAGES).shape == (2, 3)


def test_a_run_folder_named_after_its_network_is_not_the_network(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained, sizes = network("wrn-10-1", 4), {"num_classes": 4, "in_channels": 3, "image_size": 32}
    puma.models.weights.save_model(trained, "wrn-10-1/last.safetensors")
    built, weights = puma.build_model("wrn-10-1", **sizes), puma.models.weights.weights_sha256
    assert weights(resolve_model("wrn-10-1", **sizes)) == weights(built)  # of `puma train --model wrn-10-1`
    for spec in ("wrn-10-1", "./wrn-10-1"):  # of `puma score`, which knows no sizes, and of a path
        assert weights(resolve_model(spec, **(sizes if "/" in spec else {}))) == weights(trained)
    assert weights(resolve_model("wrn-10-1", "wrn-10-1", **sizes)) == weights(trained)
    with pytest.raises(ModelError, match=r"\./wrn-10-1 has weights of its own"):
        resolve_model("./wrn-10-1", "other.safetensors", **sizes)


def test_a_factory_that_fails_was_found(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "failing.py").write_text("def net():\n    return None.attribute\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="the factory 'failing:net' failed") as caught:
        resolve_model("failing:net")
    assert "AttributeError: 'NoneType'" in caught.value.why
    with pytest.raises(UsageError, match="without weights failing:net keeps the last layer it has"):
        resolve_model("failing:net", new_head=True, num_classes=3)
    with pytest.raises(ModelError, match="cannot find the factory 'failing:ned'"):
        resolve_model("failing:ned")


@pytest.mark.usefixtures("packages")
def test_what_a_package_cannot_give_is_named_with_what_helps(tmp_path: Path, monkeypatch) -> None:
    for package in ("timm", "torchvision"):
        with pytest.raises(ModelError, match=f"{package} has no model 'tinny'") as caught:
            resolve_model(f"{package}:tinny")
        assert "did you mean 'tiny'?" in caught.value.fix
        with pytest.raises(ModelError, match=f"{package}:remote cannot be built with its weights") as caught:
            resolve_model(f"{package}:remote")
        assert caught.value.why == "no network"
        assert "--weights FILE" in caught.value.fix
        code = caught.value.fix.partition('python -c "')[2].rstrip('"')
        with pytest.raises(OSError, match="no network"):
            exec(code)  # it is what fetches them
    monkeypatch.chdir(tmp_path)
    for content in (Stand(7), {"state_dict": Stand(7).state_dict(), "where": Path("/")}):
        torch.save(content, "odd.pt")
        with pytest.raises(ModelError, match=r"cannot read odd\.pt") as caught:
            resolve_model("timm:tiny", "odd.pt")
        assert "can run any code hidden in the file" in caught.value.why
        exec(caught.value.fix.partition('python -c "')[2].rstrip('"'))
        assert resolve_model("timm:tiny", "weights.pt")(IMAGES).shape == (2, 7)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"other\.pt does not fit Stand"):
        resolve_model("timm:tiny", tmp_path / "other.pt")
    with pytest.raises(ModelError, match="cannot read") as caught:
        resolve_model("timm:tiny", tmp_path / "none.pt")
    assert caught.value.fix == "check the path"


@pytest.mark.usefixtures("packages")
def test_classes_and_pixels_of_another_data_set_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 3), dtype=np.uint8)
    model = resolve_model("timm:tiny")
    assert model.image_size == 2  # of its configuration
    model.image_size = 224
    puma.evaluate(model, puma.load_dataset((images, np.arange(20) % 4)), "Linf:0.1", attack="clean")
    assert "the model has 1000 classes, the data 4: labels are taken by number" in caplog.text
    assert "made for images of 224 pixels, these have 2: ?resize=224" in caplog.text


def test_an_image_size_of_the_users_own_is_no_warning(caplog: pytest.LogCaptureFixture, capsys) -> None:
    class Sized(nn.Sequential):
        image_size = (2, 2)

    images = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 3), dtype=np.uint8)
    model = Sized(nn.Flatten(), nn.Linear(12, 4)).eval()
    puma.evaluate(model, puma.load_dataset((images, np.arange(20) % 4)), "Linf:0.1", attack="clean")
    assert "pixels" not in caplog.text
    assert "Logging error" not in capsys.readouterr().err


def test_a_misspelt_kind_and_a_name_of_a_package_get_the_right_one() -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model("torchvison:resnet18")
    assert caught.value.fix == "did you mean torchvision:resnet18?"
    with pytest.raises(UsageError, match="unknown model 'resnet18'") as unknown:
        resolve_model("resnet18", num_classes=10)
    assert "torchvision:NAME" in unknown.value.fix
    with pytest.raises(ModelError, match="cannot read weights timm:tiny") as caught:
        puma.load_model("timm:tiny")
    assert caught.value.fix == "a published model: puma.models.zoo.resolve_model('timm:tiny')"


def test_weights_of_another_program_are_shown_with_what_reads_them(tmp_path: Path, command, capsys) -> None:
    save_file(Stand(3).state_dict(), tmp_path / "theirs.safetensors")
    (tmp_path / "factory.py").write_text("from torch import nn\nmodel = lambda: nn.Linear(2, 2)\n")
    assert command("show", tmp_path / "theirs.safetensors") == 0
    assert f"next  puma score module:factory SOURCE --weights {tmp_path}" in capsys.readouterr().out
    assert command("score", tmp_path / "theirs.safetensors", "digits", "--out", tmp_path / "out") == 4
    assert f"torchvision:NAME, timm:NAME or package.module:factory --weights {tmp_path}" in capsys.readouterr().err
    assert command("show", "timm:resnet18") == 3
    assert "that is a model: puma score timm:resnet18 SOURCE" in capsys.readouterr().err


def test_the_classes_of_a_run_go_with_its_weights(tmp_path: Path, monkeypatch, command, capsys) -> None:
    """A network that PUMA did not build, on test data that counts the classes in another order."""
    (tmp_path / "ours.py").write_text(
        "from torch import nn\nnet = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run, threat = tmp_path / "run", ("--threat", "Linf:0.1", "--device", "cpu", "--quiet")
    recipe = ("--recipe", "digits", "--set", "steps=100", "--set", "batch_size=32")
    assert command("train", "--real", "digits?classes=3,8", "--model", "ours:net", *recipe, "--out", run, *threat) == 0
    capsys.readouterr()
    shares = {}
    for order in ("3,8", "8,3"):
        test = ("--data", f"digits:test?classes={order}", "--attack", "clean", "--checkpoint", "last")
        assert command("evaluate", "ours:net", "--weights", run, *test, *threat, "--out", tmp_path / order) == 0
        record = next((tmp_path / order).glob("evaluation*.json"))
        shares[order] = json.loads(record.read_text())["clean_accuracy"]
    assert shares["3,8"] == shares["8,3"] > 0.9
    assert Run.read(run, nn.Sequential(nn.Flatten(), nn.Linear(64, 2))).model.class_names == ("3", "8")
    assert command("show", run) == 0
    assert f"next  puma evaluate module:factory --weights {run}" in capsys.readouterr().out
    assert command("evaluate", run, "--data", "digits:test?classes=3,8", *threat) == 4
    assert "torchvision:NAME, timm:NAME or package.module:factory" in capsys.readouterr().err


class Settings:
    """As the configuration of a network of transformers: an object."""


@pytest.mark.parametrize("config", [Settings(), {"name": "wrn-10-1", "num_classes": 2}])
def test_a_network_may_have_a_config_of_its_own(tmp_path: Path, monkeypatch, config) -> None:
    """Also one that looks like ours."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    net.config = config
    real = puma.load_dataset("digits?classes=3,8&subset=60")
    changes = {"recipe": load_recipe("digits", steps=50, batch_size=32), "validation": 10}
    run = puma.train(net, puma.Pool([real]), threat="Linf:0.1", out=tmp_path / "run", **changes)
    table = puma.score_margins(run.model, puma.Pool([real]), norm="Linf", mode="fast")
    assert table.meta["model"]["name"] == "Sequential"
    assert puma.evaluate(run.model, real, "Linf:0.1", attack="clean", out=tmp_path / "e").clean_accuracy > 0.8
    assert Run.read(tmp_path / "run", net).model.class_names == ("3", "8")
    with pytest.raises(ModelError, match="a model that PUMA did not build"):
        puma.load_model(tmp_path / "run")


def installed(name: str) -> Any:
    """The real package; it is no dependency, and may not fit the torch that is here."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def test_a_real_network_of_transformers(tmp_path: Path) -> None:
    transformers = installed("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(num_labels=2, image_size=8, patch_size=4, num_channels=1, **sizes)
    real = puma.load_dataset("digits?classes=3,8&subset=60")
    changes = {"recipe": load_recipe("digits", steps=5, batch_size=16), "validation": 10}
    net = transformers.ViTForImageClassification(config)
    run = puma.train(net, puma.Pool([real]), threat="Linf:0.1", out=tmp_path / "run", **changes)
    assert len(puma.score_margins(run.model, puma.Pool([real]), norm="Linf", mode="fast")) == 60
    assert puma.evaluate(run.model, real, "Linf:0.1", attack="clean").n_clean == 60


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "squeezenet1_1"])
def test_real_models_of_torchvision(tmp_path: Path, name: str) -> None:
    models = installed("torchvision.models")
    theirs = models.get_model(name, weights=None, num_classes=12).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    if hasattr(theirs, "transform_input"):
        theirs.transform_input = True
    images, preset = torch.rand(2, 3, 64, 64), models.get_model_weights(name).DEFAULT.transforms()
    found = resolve_model(f"torchvision:{name}", tmp_path / "w.pth")
    torch.testing.assert_close(found(images), normalised(theirs, images, preset.mean, preset.std))
    assert resolve_model(f"torchvision:{name}", tmp_path / "w.pth", new_head=True, num_classes=5)(images).shape == (
        2,
        5,
    )


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_real_models_of_timm(tmp_path: Path, name: str) -> None:
    timm = installed("timm")
    theirs = timm.create_model(name, num_classes=12).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "w.pt")
    config = timm.data.resolve_model_data_config(theirs)
    images = torch.rand(2, 3, 224, 224)
    found = resolve_model(f"timm:{name}", tmp_path / "w.pt")
    torch.testing.assert_close(found(images), normalised(theirs, images, config["mean"], config["std"]))
    assert resolve_model(f"timm:{name}", tmp_path / "w.pt", new_head=True, num_classes=5)(images).shape == (2, 5)


def test_models_of_the_hub_are_built(monkeypatch, tmp_path: Path) -> None:
    images = torch.rand(2, 1, 8, 8)
    ours = puma.build_model("small-cnn", 10, in_channels=1, image_size=8)
    puma.models.weights.save_model(ours.eval(), tmp_path / "model.safetensors")
    hub = SimpleNamespace(hf_hub_download=lambda repo, file: str(tmp_path / file))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_model("hf:me/model").config == ours.config
    assert torch.equal(resolve_model("hf:me/model")(images), ours(images))


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
