"""Our weights in RobustBench's own classes: every key fits, and the logits are ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from randomised_model import randomised
from torch import nn

from puma.models.networks import build_model
from puma.models.zoo import from_robustbench, to_robustbench

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("DMWideResNet", "wrn-28-10", {}),
    ("DMWideResNet", "wrn-16-2", {"activation": "relu", "num_classes": 100}),
    ("DMPreActResNet", "preactresnet-18", {}),
    ("DMPreActResNet", "preactresnet-34", {"activation": "relu", "mean": (0.3, 0.4, 0.5)}),
]


def robustbench_file(name: str) -> ModuleType:
    """One file of the installed package; the package as a whole imports torchvision and timm, which we do without."""
    package = importlib.util.find_spec("robustbench")
    if package is None or package.origin is None:
        pytest.skip("robustbench is not installed (pip install --no-deps robustbench)")
    path = Path(package.origin).parent / "model_zoo" / "architectures" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"robustbench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("architecture", "name", "options"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_state_dict_loads_strictly_and_gives_the_same_logits(
    architecture: str, name: str, options: dict[str, Any]
) -> None:
    module = robustbench_file("dm_wide_resnet")
    model = randomised(build_model(name, **{"num_classes": 10, **options}))
    described = to_robustbench(model)
    assert described.architecture == architecture
    arguments = dict(described.arguments)
    if "activation_fn" in arguments:
        arguments["activation_fn"] = getattr(nn, arguments["activation_fn"])
    theirs = getattr(module, architecture)(**arguments).eval()
    theirs.load_state_dict(described.weights, strict=True)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)
        chosen = {key: options[key] for key in ("activation", "num_classes", "mean") if key in options}
        back = from_robustbench(theirs.state_dict(), name, **chosen)
        torch.testing.assert_close(back(images), expected, rtol=0, atol=1e-6)
