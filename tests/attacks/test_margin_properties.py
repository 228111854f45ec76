"""What holds for every model and shape; FAB beside it on a robust network; what a GPU would have to wait for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.fab_pt import FABAttack_PT
from test_deepfool import Curved, batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from puma.attacks.deepfool import deepfool
from puma.margins import Status

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def network(shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """A small network of random weights on images of ``shape``; with a convolution where they are images."""
    torch.manual_seed(seed)
    first = [nn.Conv2d(shape[0], 4, 3, padding=1), nn.ReLU()] if len(shape) == 3 else []
    inputs = 4 * shape[1] * shape[2] if len(shape) == 3 else int(np.prod(shape))
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, classes)).eval()


SHAPES = st.one_of(
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5)),
)


@settings(max_examples=40, deadline=None)
@given(
    SHAPES,
    st.integers(0, 7),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 10_000),
    st.sampled_from(["Linf", "L2"]),
    st.sampled_from(["fast", "deepfool", "refined", "tight"]),
)
def test_margins_mean_what_they_say_for_any_shape(shape, rows, classes, chunk, seed, norm, mode) -> None:
    model = network(shape, classes, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, *shape, generator=generator).round(decimals=1)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    hit = deepfool(model, x, labels, norm=norm, mode=mode, chunk=chunk)
    assert hit.margin.shape == hit.codes.shape == hit.steps.shape == labels.shape
    assert hit.adversarial.shape == x.shape
    with torch.no_grad():
        before, after = model(x).argmax(1), model(hit.adversarial).argmax(1)
    assert (hit.predicted == before).all()
    wrong = before != labels
    assert ((hit.codes == Status.MISCLASSIFIED) == wrong).all()
    assert (hit.margin[wrong] < 0).all()
    crossed, estimated = hit.codes == Status.CROSSED, hit.codes == Status.ESTIMATED
    assert not (crossed if mode == "fast" else estimated).any()
    assert (hit.margin[crossed | estimated] > 0).all()
    assert hit.margin[~(crossed | estimated | wrong)].isnan().all()
    found = crossed | (wrong & hit.margin.isfinite())
    if mode != "fast":
        assert ((after == labels) == wrong)[found].all()
        difference = (hit.adversarial - x).flatten(1)
        length = difference.abs().amax(1) if norm == "Linf" else difference.norm(dim=1)
        torch.testing.assert_close(length[found], hit.margin.abs()[found])
        assert ((hit.adversarial >= 0) & (hit.adversarial <= 1)).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_margins_are_as_tight_as_fab_on_a_robust_network(norm) -> None:
    from robust_cnn import load_robust_cnn

    model = load_robust_cnn()
    coarse = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    x = nn.functional.interpolate(coarse, size=16, mode="bilinear").clamp(0, 1)
    labels = model(x).argmax(1)
    attack = FABAttack_PT(model, norm=norm, n_iter=10, n_restarts=1, eps=1.0 if norm == "Linf" else 10.0, device="cpu")
    adversarial = attack.attack_single_run(x, labels)
    assert (model(adversarial).argmax(1) != labels).all()
    difference = (adversarial - x).flatten(1)
    fab = difference.abs().amax(1) if norm == "Linf" else difference.norm(dim=1)
    ratio = {mode: deepfool(model, x, labels, norm=norm, mode=mode).margin / fab for mode in ("refined", "tight")}
    assert 0.9 < ratio["refined"].median() < 1.03
    assert 0.9 < ratio["tight"].median() < 1.01
    assert ratio["refined"].mean() < 1.08


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers taken off it, and selections of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.selections = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.numbers += name == "aten::_local_scalar_dense"
        masks = args[1] if name == "aten::index.Tensor" else []
        self.selections += name == "aten::nonzero" or any(
            isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["deepfool", "refined", "tight"])
def test_the_host_waits_a_few_times_a_round_whatever_the_number_of_images(mode) -> None:
    model, x = Curved().eval(), batch(200, 9)
    labels = model(x).argmax(1)
    with Waits() as few:
        start = deepfool(model, x[:40], labels[:40], mode=mode, steps=1)
    with Waits() as many:
        hit = deepfool(model, x, labels, mode=mode, chunk=200)
    assert many.numbers == few.numbers  # whatever the number of rounds
    assert start.steps.max() == 1 < hit.steps.max()
    assert many.selections <= 5 * int(hit.steps.max()) + 20
