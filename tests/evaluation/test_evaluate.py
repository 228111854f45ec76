"""`evaluate` against a plain pyautoattack call, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from puma.evaluation import Evaluation, evaluate
from puma.evaluation.attacks import STANDARD, full_cost
from puma.threat import ThreatModel
from puma.tradeoff import wilson_interval

LINF = ThreatModel("Linf", 0.02)
L2 = ThreatModel("L2", 0.08)


def tensors(images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(np.stack([image for image, _ in images])).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.tensor([label for _, label in images])


def plain_flags(model: nn.Module, images: list[Any], threat: ThreatModel, batch_size: int) -> np.ndarray:
    """Per-image robustness by pyautoattack, called as its README says."""
    pixels, labels = tensors(images)
    attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=0, version="standard")
    adversarial, _ = attack.run_standard_evaluation(pixels, labels, batch_size=batch_size)
    with torch.no_grad():
        return (model(adversarial).argmax(1) == labels).numpy()


@pytest.mark.usefixtures("short_attacks")
@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("batch_size", [40, 12])
def test_flags_equal_plain_autoattack(
    network: nn.Module, images: list[Any], threat: ThreatModel, batch_size: int
) -> None:
    result = evaluate(network, images, threat, batch_size=batch_size, shard_rows=40)
    expected = plain_flags(network, images, threat, batch_size)
    assert 0.1 < expected.mean() < 0.7
    np.testing.assert_array_equal(result.robust, expected)


@pytest.mark.usefixtures("short_attacks")
def test_shards_equal_plain_autoattack_on_each(network: nn.Module, images: list[Any]) -> None:
    result = evaluate(network, images, LINF, batch_size=12, shard_rows=20)
    plain = [plain_flags(network, images[start : start + 20], LINF, 12) for start in (0, 20)]
    np.testing.assert_array_equal(result.robust, np.concatenate(plain))


@pytest.mark.timeout(900)
def test_full_strength_costs_what_we_say(network: nn.Module, images: list[Any]) -> None:
    """No shortened attacks: the library's own iterations, counted on two images that withstand them."""
    result = evaluate(network, images[1:3], ThreatModel("Linf", 0.0005))
    assert result.robust.all()
    counted = {entry["attack"]: entry["cost"] for entry in result.meta["log"]}
    assert counted == {step: 2 * full_cost(step, targets=9) for step in STANDARD}


@pytest.mark.usefixtures("short_attacks")
def test_what_is_reported(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    result = evaluate(network, images, LINF, out=tmp_path)
    assert (result.clean_accuracy, result.n_clean, result.n_test) == (0.8, 40, 40)
    assert result.robust_accuracy is not None
    assert result.apgd_accuracy is not None
    assert 0 < result.robust_accuracy <= result.apgd_accuracy < 0.8
    assert result.robust_interval == wilson_interval(result.robust_accuracy, 40)
    assert set(result.broken_by) <= {None, "clean", *STANDARD}
    np.testing.assert_array_equal(result.broken_by == "clean", ~result.clean_correct)
    value = json.loads((tmp_path / "evaluation.json").read_text())
    assert value["robust_accuracy"] == result.robust_accuracy
    assert value["settings"]["seed"] == 0
    table = pq.read_table(tmp_path / "evaluation.parquet")
    assert table.column_names == ["index", "label", "clean_correct", "robust", "broken_by"]
    assert table["robust"].to_pylist() == result.robust.tolist()
    again = Evaluation.read(tmp_path)
    assert again.to_json() == result.to_json()
    np.testing.assert_array_equal(again.broken_by, result.broken_by)


def test_subset_is_stratified_and_labelled(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    result = evaluate(network, images, LINF, subset=20, attack="pgd-5", out=tmp_path)
    assert (result.n_test, result.n_clean) == (20, 40)
    assert "accuracy under pgd-5" in result.describe()
    assert "subset of 20 of 40" in result.describe()
    assert result.robust_accuracy is None
    assert result.robust_interval is not None
    whole = np.bincount(result.label, minlength=10)
    part = np.bincount(result.label[result.attacked], minlength=10)
    assert np.abs(part - whole / 2).max() < 1
    assert Evaluation.read(tmp_path / "evaluation-pgd-5.json").n_test == 20
    robust = pq.read_table(tmp_path / "evaluation-pgd-5.parquet")["robust"].to_pylist()
    assert [flag is None for flag in robust] == (~result.attacked).tolist()


def test_weaker_attacks_by_name(network: nn.Module, images: list[Any]) -> None:
    clean = evaluate(network, images, LINF, attack="clean")
    assert clean.n_test == 0
    assert clean.robust_accuracy is None
    assert clean.attacked_accuracy is None
    assert clean.describe() == "clean accuracy 80.00% (95 % interval 65.2% to 89.5%) on 40 images"
    flags = {}
    for attack in ("pgd-20", "cw-20", "ce-cw-20", "apgd-ce"):
        result = evaluate(network, images, LINF, attack=attack)
        assert result.attacked_accuracy is not None
        assert 0 < result.attacked_accuracy < 0.8, attack
        flags[attack] = result.robust.tolist()
    assert flags["pgd-20"] == flags["ce-cw-20"]  # two names; what CE or CW breaks is broken
    assert not any(both and not cw for both, cw in zip(flags["pgd-20"], flags["cw-20"], strict=True))


@pytest.mark.usefixtures("short_attacks")
@pytest.mark.parametrize("classes", [4, 5])
def test_few_classes(labelled: Callable[..., Any], new_network: Callable[..., nn.Module], classes: int) -> None:
    model = new_network(classes=classes)
    result = evaluate(model, labelled(model, 20), ThreatModel("Linf", 0.1))
    assert result.robust_accuracy is not None
    assert 0 < result.robust_accuracy < 0.8


@pytest.mark.usefixtures("short_attacks")
def test_eps_zero_breaks_nothing(network: nn.Module, images: list[Any]) -> None:
    result = evaluate(network, images, ThreatModel("Linf", 0.0))
    np.testing.assert_array_equal(result.robust, result.clean_correct)
    assert result.attack_cost == 0


@pytest.mark.usefixtures("short_attacks")
def test_model_and_global_state_are_left_alone(network: nn.Sequential, images: list[Any]) -> None:
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate(network, images[:10], LINF)
    assert torch.equal(torch.rand(3), expected)
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
