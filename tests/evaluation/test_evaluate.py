"""`evaluate` against a plain pyautoattack call, and what it keeps."""

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

import puma.evaluation.driver as driver
from puma.evaluation import Evaluation, evaluate
from puma.threat import ThreatModel

LINF = ThreatModel("Linf", 0.02)


def tensors(images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(np.stack([image for image, _ in images])).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.tensor([label for _, label in images])


def plain_flags(model: nn.Module, images: list[Any], threat: ThreatModel, batch_size: int) -> np.ndarray:
    """Per-image robustness by pyautoattack called as its README says."""
    pixels, labels = tensors(images)
    attack = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=0, version="standard")
    adversarial, _ = attack.run_standard_evaluation(pixels, labels, batch_size=batch_size)
    with torch.no_grad():
        return (model(adversarial).argmax(1) == labels).numpy()


@pytest.mark.parametrize("threat", [LINF, ThreatModel("L2", 0.08)], ids=str)
def test_flags_equal_plain_autoattack(network: nn.Module, images: list[Any], threat: ThreatModel) -> None:
    result = evaluate(network, images, threat, batch_size=16, piece_rows=40)
    expected = plain_flags(network, images, threat, 16)
    assert 0.1 < expected.mean() < 0.7
    np.testing.assert_array_equal(result.robust, expected)
    assert result.clean_accuracy == 0.8
    assert result.robust_accuracy == expected.mean()
    assert result.apgd_accuracy is not None
    assert result.apgd_accuracy >= result.robust_accuracy


def test_finished_evaluation_is_not_repeated(
    network: nn.Module, images: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(network, images, LINF, out=tmp_path, batch_size=16)
    monkeypatch.setattr(driver._Job, "run", lambda *_: pytest.fail("attacked again"))
    again = evaluate(network, images, LINF, out=tmp_path, batch_size=16)
    np.testing.assert_array_equal(again.robust, first.robust)
    np.testing.assert_array_equal(again.broken_by, first.broken_by)
    assert again.to_json() == first.to_json()
    value = json.loads((tmp_path / "evaluation.json").read_text())
    assert value["robust_accuracy"] == first.robust_accuracy
    table = pq.read_table(tmp_path / "evaluation.parquet")
    assert table.column_names == ["index", "label", "clean_correct", "robust", "broken_by"]
    assert table["robust"].to_pylist() == first.robust.tolist()


def test_subset_is_stratified_and_labelled(network: nn.Module, images: list[Any], tmp_path: Path) -> None:
    result = evaluate(network, images, LINF, subset=20, attack="pgd-5", out=tmp_path)
    assert (result.n_test, result.n_clean) == (20, 40)
    assert "subset of 20 of 40" in result.describe()
    assert result.robust_accuracy is None
    assert Evaluation.read(tmp_path / "evaluation-pgd-5.json").attacked.sum() == 20


def test_few_classes(labelled: Callable[..., Any], new_network: Callable[..., nn.Module]) -> None:
    model = new_network(classes=5)
    result = evaluate(model, labelled(model, 12), LINF)
    assert result.robust_accuracy is not None
    assert 0 < result.robust_accuracy < 1
    small = new_network(classes=3)
    with pytest.raises(ValueError, match="needs four classes; this model has 3"):
        evaluate(small, labelled(small, 12), LINF)
