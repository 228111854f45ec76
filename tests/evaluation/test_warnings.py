"""AutoAttack's warnings reach the user with what they mean."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puma.evaluation import evaluate
from puma.evaluation.attacks import WARNINGS, explain
from puma.threat import ThreatModel

LINF = ThreatModel("Linf", 0.02)

pytestmark = pytest.mark.usefixtures("short_attacks")


def raised(model: nn.Module, images: list[Any]) -> set[str]:
    return {str(warning["flag"]) for warning in evaluate(model, images, LINF).warnings}


def test_clean_model_raises_none(network: nn.Module, images: list[Any]) -> None:
    assert raised(network, images) <= {"square-gains"}


class Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits + 1e-4 * torch.randn(logits.shape, generator=self.generator)


def test_randomised(network: nn.Module, images: list[Any]) -> None:
    assert "randomised" in raised(Noisy(network), images)


class Dynamic(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            point = images.detach().clone().requires_grad_()
            torch.autograd.grad(self.model(point).sum(), point)
        logits: Tensor = self.model(images)
        return logits


def test_dynamic_is_not_remembered_for_the_next_model(network: nn.Module, images: list[Any]) -> None:
    tracer = sys.gettrace()
    assert "dynamic" in raised(Dynamic(network), images)
    assert "dynamic" not in raised(network, images)
    assert sys.gettrace() is tracer


class Quantised(nn.Module):
    """Rounds its input: no gradient anywhere, so that only Square gets through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images * 64).round() / 64)
        return logits


def test_masked_gradients(network: nn.Module, images: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "puma"):
        assert {"zero-gradient", "square-gains"} <= raised(Quantised(network), images)
    assert "look for quantisation, saturation or masking" in caplog.text


class Confident(nn.Module):
    """The same classes with logits so large that the cross-entropy and its gradient are 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images) * 10_000
        return logits


@pytest.mark.parametrize("attack", ["pgd-20", "ce-cw-20", "apgd-ce", "standard"])
def test_vanishing_gradients_hide_nothing_and_are_flagged(network: nn.Module, images: list[Any], attack: str) -> None:
    plain, confident = (evaluate(model, images, LINF, attack=attack) for model in (network, Confident(network)))
    assert "zero-gradient" in {warning["flag"] for warning in confident.warnings}
    assert "zero-gradient" not in {warning["flag"] for warning in plain.warnings}
    assert plain.attacked_accuracy is not None
    assert confident.attacked_accuracy is not None
    assert confident.attacked_accuracy <= plain.attacked_accuracy + 0.1
    alone = evaluate(Confident(network), images, LINF, attack="cw-20")
    assert "zero-gradient" not in {warning["flag"] for warning in alone.warnings}
    assert "zero-gradient" in {w["flag"] for w in evaluate(Quantised(network), images, LINF, attack="cw-20").warnings}


def test_every_warning_is_explained() -> None:
    explained = explain(dict.fromkeys(WARNINGS, 1))
    assert [entry["flag"] for entry in explained] == list(WARNINGS)
    (unknown,) = explain({"a text of a later version": 3})
    assert unknown["times"] == 3
    assert "does not know" in str(unknown["means"])
