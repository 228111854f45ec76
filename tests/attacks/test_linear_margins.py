"""DeepFool on linear models, whose margins are known: closed form by bisection, and linear and quadratic programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from puma.attacks.deepfool import deepfool
from puma.threat import Norm

NORMS: list[Norm] = ["Linf", "L2"]


def linear(classes: int, pixels: int, seed: int, scale: float = 1.0) -> nn.Sequential:
    """A linear model with weights of very different sizes (so that the Linf and L2 optima differ)."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(pixels, classes)
    with torch.no_grad():
        sizes = torch.rand(pixels, generator=generator).pow(3) + 0.01
        layer.weight.copy_(torch.randn(classes, pixels, generator=generator) * sizes * scale)
        layer.bias.copy_(-layer.weight @ torch.full((pixels,), 0.5) + 0.1 * torch.randn(classes, generator=generator))
    return nn.Sequential(nn.Flatten(), layer).eval()


def images_for(pixels: int, count: int, seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 100)
    return low + (high - low) * torch.rand(count, 1, 1, pixels, generator=generator)


def exact_distance(w: np.ndarray, level: float, x: np.ndarray, norm: Norm) -> float:
    """Least norm of d with w . d >= level and x + d in the box: bisection on the walking time, in float64."""
    room = np.where(w > 0, 1 - x, x)
    speed = np.abs(w) if norm == "L2" else np.ones_like(w)
    if (np.abs(w) * room).sum() < level:
        return np.inf
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if (np.abs(w) * np.minimum(middle * speed, room)).sum() < level:
            low = middle
        else:
            high = middle
    step = np.minimum(high * speed, room) * (w != 0)
    return float(np.linalg.norm(step) if norm == "L2" else step.max())


def exact_margins(model: nn.Sequential, x: Tensor, labels: Tensor, norm: Norm) -> np.ndarray:
    layer = model[1]
    weight = layer.weight.detach().double().numpy()
    flat = x.flatten(1).double().numpy()
    logits = flat @ weight.T + layer.bias.detach().double().numpy()
    margins = []
    for row, own in enumerate(labels.tolist()):
        others = [k for k in range(len(weight)) if k != own]
        margins.append(
            min(
                exact_distance(weight[k] - weight[own], logits[row, own] - logits[row, k], flat[row], norm)
                for k in others
            )
        )
    return np.array(margins)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["deepfool", "refined", "tight"])
@pytest.mark.parametrize(
    ("classes", "pixels", "low", "high"), [(2, 5, 0, 1), (4, 30, 0.3, 0.7), (12, 60, 0, 1), (3, 8, 0, 0.05)]
)
def test_margins_of_linear_models_are_exact(norm: Norm, mode, classes, pixels, low, high) -> None:
    model = linear(classes, pixels, seed=classes)
    x = images_for(pixels, 40, classes, low, high)
    labels = model(x).argmax(1)
    hit = deepfool(model, x, labels, norm=norm, mode=mode)
    exact = exact_margins(model, x, labels, norm)
    reachable = np.isfinite(exact)
    assert reachable.sum() >= 20
    assert (hit.status[reachable] == "crossed").all()
    assert (hit.status[~reachable] == "unconverged").all()
    ratio = hit.margin.numpy()[reachable] / exact[reachable]
    assert ratio.min() >= 1 - 1e-4
    assert ratio.max() <= 1.05
    found = hit.adversarial[torch.from_numpy(reachable)]
    assert (model(found).argmax(1) != labels[torch.from_numpy(reachable)]).all()
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_estimates_of_linear_models_are_their_margins(norm: Norm) -> None:
    model = linear(4, 30, seed=4)
    x = images_for(30, 40, 4)
    labels = model(x).argmax(1)
    labels[::8] = (labels[::8] + 1) % 4
    hit = deepfool(model, x, labels, norm=norm, mode="fast")
    right = hit.status == "estimated"
    exact = exact_margins(model, x, labels, norm)
    np.testing.assert_allclose(hit.margin.numpy()[right], exact[right], rtol=0.02)
    back = np.array([way_back(model, x[i].flatten().double().numpy(), int(labels[i]), norm) for i in range(0, 40, 8)])
    bound = -hit.margin.numpy()[::8]
    assert (hit.status[::8] == "misclassified").all()
    assert (bound <= back * 1.01).all()  # the farthest half-space alone: never beyond the region of them all
    assert (bound > 0.3 * back).all()


def way_back(model: nn.Sequential, x: np.ndarray, own: int, norm: Norm) -> float:
    """Distance from x to the label's region in the box, by a linear or a quadratic program."""
    layer = model[1]
    weight = layer.weight.detach().double().numpy()
    logits = weight @ x + layer.bias.detach().double().numpy()
    others = [k for k in range(len(weight)) if k != own]
    normals = weight[own] - weight[others]
    levels = logits[others] - logits[own]
    pixels = len(x)
    if norm == "Linf":
        cost = np.r_[np.zeros(pixels), 1.0]
        both = np.vstack([np.c_[np.eye(pixels), -np.ones(pixels)], np.c_[-np.eye(pixels), -np.ones(pixels)]])
        rows = np.vstack([np.c_[-normals, np.zeros(len(others))], both])
        right = np.r_[-levels, np.zeros(2 * pixels)]
        answer = linprog(cost, A_ub=rows, b_ub=right, bounds=[*zip(-x, 1 - x, strict=True), (0, None)])
        return float(answer.fun) if answer.success else np.inf
    constraint = {"type": "ineq", "fun": lambda d: normals @ d - levels, "jac": lambda d: normals}
    answer = minimize(
        lambda d: d @ d,
        np.zeros(pixels),
        jac=lambda d: 2 * d,
        bounds=list(zip(-x, 1 - x, strict=True)),
        constraints=[constraint],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return float(np.sqrt(answer.fun)) if answer.success else np.inf


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["refined", "tight"])
@pytest.mark.parametrize(("classes", "pixels"), [(2, 10), (3, 12), (5, 30), (10, 40)])
def test_misclassified_images_know_their_way_back(norm: Norm, mode, classes, pixels) -> None:
    model = linear(classes, pixels, seed=classes + 7)
    x = images_for(pixels, 30, classes)
    labels = (model(x).argmax(1) + 1 + torch.arange(30) % (classes - 1)) % classes
    hit = deepfool(model, x, labels, norm=norm, mode=mode)
    assert (hit.status == "misclassified").all()
    exact = np.array([way_back(model, x[i].flatten().double().numpy(), int(labels[i]), norm) for i in range(30)])
    reachable = np.isfinite(exact)
    assert reachable.sum() >= 15
    margin = hit.margin.numpy()
    assert (margin < 0).all()
    assert (margin[~reachable] == -np.inf).all()
    ratio = -margin[reachable] / exact[reachable]
    assert ratio.min() >= 1 - 1e-3
    assert ratio.max() <= 1.05
    back = hit.adversarial[torch.from_numpy(reachable)]
    assert (model(back).argmax(1) == labels[torch.from_numpy(reachable)]).all()


def test_deepfool_goes_to_the_nearest_of_the_four_strongest_rivals() -> None:
    """Rivals are 0.1, 0.11, 0.12, 0.13 and 0.14 behind, and ever steeper: the fourth is nearest of those looked at."""
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[1:, 1:] = torch.diag(torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9]))
        layer.bias.copy_(-layer.weight @ torch.full((6,), 0.5) - torch.tensor([0.0, 0.1, 0.11, 0.12, 0.13, 0.14]))
    model = nn.Sequential(nn.Flatten(), layer).eval()
    hit = deepfool(model, torch.full((1, 1, 1, 6), 0.5), torch.tensor([0]), norm="L2", mode="deepfool")
    assert (int(hit.steps[0]), hit.passes[1]) == (1, 4)
    assert float(hit.margin[0]) == pytest.approx(0.13 / 0.8, rel=0.01)
