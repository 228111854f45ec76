"""What `evaluate` refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from puma.errors import CheckError, DataError, ModelError, ResumeError, StorageError, UsageError
from puma.evaluation import evaluate
from puma.evaluation.attacks import Attacker
from puma.io import lock
from puma.threat import ThreatModel

LINF = ThreatModel("Linf", 0.02)


class Changed(nn.Module):
    """A model whose logits are changed by a function."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(images, self.model(images))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attack": "autoattack"}, UsageError, "unknown attack"),
        ({"attack": "pgd-0"}, UsageError, "unknown attack"),
        ({"subset": 0}, UsageError, "subset = 0 is not an integer"),
        ({"subset": 41}, UsageError, "a subset of 41 cannot be taken from 40 images"),
        ({"batch_size": 0}, UsageError, "batch_size = 0 is not an integer"),
        ({"shard_rows": -1}, UsageError, "shard_rows = -1 is not an integer"),
        ({"worker": 2, "num_workers": 2}, UsageError, "worker 2 of 2"),
        ({"num_workers": 2}, UsageError, "need a folder"),
    ],
)
def test_arguments(
    network: nn.Module, images: list[Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(network, images, LINF, **arguments)


def test_datasets(network: nn.Module) -> None:
    grey = np.zeros((8, 8, 1), np.uint8)
    for items, message in (
        ([], "is empty"),
        ([grey], "is a ndarray"),
        ([(torch.randn(1, 8, 8) * 3, 0)], "normalised"),
        ([(grey + np.float32(7), 0)], "float32"),
        ([(np.zeros((4, 8, 8), np.uint8), 0)], "channels"),
        ([(grey, 0), (np.zeros((9, 8, 1), np.uint8), 0)], "shape"),
        ([(grey, -1)], "-1"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(network, items, LINF)  # type: ignore[arg-type]


def test_models_are_refused_before_anything_is_written(
    network: nn.Sequential, images: list[Any], new_network: Callable[..., nn.Module], tmp_path: Path
) -> None:
    for model, message in (
        (new_network().half(), "weights are float16"),
        (new_network(classes=5), "5 classes, the data 10"),
        (Changed(network, lambda _, logits: logits.mean(1)), "logits of shape [32, classes]"),
        (Changed(network, lambda x, logits: logits + torch.log(x[:, :, 0, 0] * 0 - 1)), "NaN or infinite for 32 of 32"),
        (Changed(network, lambda _, logits: logits - logits.mean(0)), "depends on the other images"),
        (Changed(network, lambda _, logits: logits * 0), "does not react to its input"),
        (Changed(network, lambda _, logits: logits.softmax(1)), "returns probabilities"),
        (Changed(network, lambda _, logits: logits + torch.randn_like(logits)), "changes from call to call"),
        (Changed(network, lambda _, logits: (logits, logits)), "returns a tuple"),  # type: ignore[arg-type,return-value]
        (Changed(network, lambda _, logits: {}["key"]), "KeyError: 'key'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "fails on images"),
    ):
        with pytest.raises(ModelError) as caught:
            evaluate(model, images, LINF, out=tmp_path / "evaluation")
        assert message in str(caught.value) + caught.value.why, message
        assert not (tmp_path / "evaluation").exists(), message


class Later(nn.Module):
    """Fails once it is attacked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        assert not bool(off_the_grid(images).any()), "no such image"
        logits: Tensor = self.model(images)
        return logits


@pytest.mark.usefixtures("short_attacks")
@pytest.mark.parametrize("attack", ["standard", "pgd-5"])
def test_an_exception_under_attack_keeps_its_traceback(network: nn.Module, images: list[Any], attack: str) -> None:
    with pytest.raises(ModelError, match="fails on images") as caught:
        evaluate(Later(network), images, LINF, attack=attack)
    first, *places = caught.value.why.splitlines()
    assert first == "AssertionError: no such image"
    assert any(f'File "{__file__}"' in place and "in forward" in place for place in places)
    assert isinstance(caught.value.__cause__, AssertionError)


@pytest.mark.parametrize("attack", ["standard", "pgd-5", "apgd-ce", "cw-5"])
def test_a_model_without_gradients_is_refused_before_any_attack(
    network: nn.Module, images: list[Any], attack: str
) -> None:
    detached = Changed(network, lambda _, logits: logits.detach())
    with pytest.raises(ModelError, match="carry no gradient"):
        evaluate(detached, images, LINF, attack=attack)
    assert evaluate(detached, images, LINF, attack="clean").clean_accuracy == 0.8


@pytest.mark.usefixtures("short_attacks")
def test_models_that_are_wrapped_scripted_or_write_into_their_input(network: nn.Sequential, images: list[Any]) -> None:
    expected = evaluate(network, images, LINF).broken_by.tolist()
    scripted = torch.jit.trace(network, torch.zeros(1, 1, 8, 8))
    writes = nn.Sequential(nn.ReLU(inplace=True), network)  # pixels are not negative: the same logits
    for model in (nn.DataParallel(network), scripted, writes, Changed(network, lambda _, logits: {"logits": logits})):  # type: ignore[arg-type,return-value]
        assert evaluate(model, images, LINF).broken_by.tolist() == expected


def test_memory_that_does_not_suffice(network: nn.Module, images: list[Any]) -> None:
    def full(images: Tensor, logits: Tensor) -> Tensor:
        if off_the_grid(images).any():
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return logits

    with pytest.raises(UsageError, match="not enough memory for batches of 256") as caught:
        evaluate(Changed(network, full), images, LINF, attack="pgd-5")
    assert "batch_size=128" in caught.value.fix


def test_three_classes(new_network: Callable[..., nn.Module], labelled: Callable[..., Any]) -> None:
    model = new_network(classes=3)
    with pytest.raises(UsageError, match="needs four classes; this model has 3"):
        evaluate(model, labelled(model, 12), LINF)
    assert evaluate(model, labelled(model, 12), LINF, attack="cw-10").attacked_accuracy is not None


def test_output_folder(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        evaluate(network, images, LINF, out=tmp_path / "file")
    with (
        lock(tmp_path / "evaluation-pgd-5-shards", ".lock-0-of-1"),
        pytest.raises(ResumeError, match="another process"),
    ):
        evaluate(network, images, LINF, out=tmp_path, attack="pgd-5")


def test_attack_outside_the_threat_model(
    network: nn.Module, images: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attacker, "perturb", lambda _, step, images, *rest: 1 - images)
    with pytest.raises(CheckError, match=r"lie outside Linf:0\.02") as caught:
        evaluate(network, images, LINF, attack="pgd-5")
    assert caught.value.exit_code == 7


def off_the_grid(images: Tensor) -> Tensor:
    """Which images were attacked: clean ones are multiples of 1/255."""
    return ((images * 255 - (images * 255).round()).abs() > 1e-3).flatten(1).any(1)


@pytest.mark.usefixtures("short_attacks")
def test_nan_under_attack(network: nn.Module, images: list[Any]) -> None:
    model = Changed(network, lambda x, logits: torch.where(off_the_grid(x).unsqueeze(1), logits * torch.nan, logits))
    with pytest.raises(CheckError, match="NaN or infinite for images perturbed"):
        evaluate(model, images, LINF)


class Unsteady(nn.Module):
    """Every second call on attacked images predicts another class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if not bool(off_the_grid(images).any()):
            return logits
        self.calls += 1
        return logits.roll(self.calls % 2, 1)


def test_contradicted_by_a_second_evaluation(network: nn.Module, images: list[Any]) -> None:
    with pytest.raises(CheckError, match="are correct when evaluated again"):
        evaluate(Unsteady(network), images, ThreatModel("Linf", 0.001), attack="pgd-2")
