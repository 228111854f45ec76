"""DeepFool on models that bend, break, or give nothing away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import puma
from puma.attacks.deepfool import BUDGETS, deepfool
from puma.attacks.halfspace import displacement, distances, step_to_nearest
from puma.errors import DataError, ModelError, UsageError


class Curved(nn.Module):
    """A small network with curved boundaries and no two alike."""

    def __init__(self, classes: int = 5, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.second(torch.tanh(3 * self.first(x.flatten(1) - 0.5)))


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(x), 2)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2] * torch.nan


class Single(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1]


class NaNBeyond(nn.Module):
    """Right at the image, NaN as soon as it moves."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1)
        return torch.stack([torch.where(total > 6, total, torch.nan), 5 + 0 * total], 1)


def batch(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("mode", ["fast", "deepfool", "refined", "tight"])
def test_batch_equals_loop_of_one_in_any_order_and_chunk(norm, mode) -> None:
    model, x = Curved().eval(), batch(24)
    labels = model(x).argmax(1)
    labels[::6] = (labels[::6] + 1) % 5  # some misclassified ones among them
    whole = deepfool(model, x, labels, norm=norm, mode=mode)
    alone = [deepfool(model, x[i : i + 1], labels[i : i + 1], norm=norm, mode=mode) for i in range(24)]
    np.testing.assert_allclose(whole.margin.numpy(), [float(hit.margin[0]) for hit in alone], rtol=1e-3)
    assert (whole.status == np.concatenate([hit.status for hit in alone])).all()
    assert repr(whole).startswith("<DeepFool 24 images: ")
    assert len(repr(whole)) < 200
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = deepfool(model, x[order], labels[order], norm=norm, mode=mode, chunk=7)
    np.testing.assert_allclose(shuffled.margin.numpy(), whole.margin[order].numpy(), rtol=1e-3)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_crossing_is_real_and_modes_are_ordered(norm) -> None:
    model, x = Curved().eval(), batch(60, 5)
    labels = model(x).argmax(1)
    hits = {mode: deepfool(model, x, labels, norm=norm, mode=mode) for mode in ("deepfool", "refined", "tight")}
    for hit in hits.values():
        crossed = torch.from_numpy(hit.status == "crossed")
        assert crossed.float().mean() > 0.9
        adversarial = hit.adversarial[crossed]
        assert (model(adversarial).argmax(1) != labels[crossed]).all()
        assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
        difference = (adversarial - x[crossed]).flatten(1)
        length = difference.abs().amax(1) if norm == "Linf" else difference.norm(dim=1)
        torch.testing.assert_close(length, hit.margin[crossed])
        assert (hit.margin[crossed] > 0).all()
    both = torch.from_numpy((hits["deepfool"].status == "crossed") & (hits["refined"].status == "crossed"))
    plain, refined, tight = (hits[mode].margin[both] for mode in ("deepfool", "refined", "tight"))
    assert (
        refined <= plain * (1 + 1e-5)
    ).float().mean() >= 0.9  # another path may end at another point of the boundary
    assert refined.mean() < plain.mean()
    assert tight.mean() <= refined.mean() * 1.001


def test_broken_models_end_with_a_status() -> None:
    x = batch(4)
    right, wrong = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    for mode in ("fast", "deepfool", "refined", "tight"):
        constant = deepfool(Constant().eval(), x, right, mode=mode)
        assert (constant.status == "no-gradient").all()
        assert constant.margin.isnan().all()
        lost = deepfool(Constant().eval(), x, wrong, mode=mode)
        assert (lost.status == "misclassified").all()
        assert (lost.margin == -torch.inf).all()
        broken = deepfool(Broken().eval(), x, right, mode=mode)
        assert (broken.status == "nan").all()
        assert broken.margin.isnan().all()
        single = deepfool(Single().eval(), x, right, mode=mode)
        assert (single.status == "unconverged").all()
        assert single.margin.isnan().all()
    beyond = deepfool(NaNBeyond().eval(), torch.full((3, 3, 2, 2), 0.6), right[:3], mode="deepfool")
    assert (beyond.status == "nan").all()


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("mode", ["fast", "deepfool", "refined", "tight"])
def test_margins_do_not_depend_on_the_scale_of_the_logits(norm, mode) -> None:
    """Nor do they turn into 0 or into something else where float32 overflows: that is a status."""
    model, x = Curved().eval(), batch(40, 5)
    labels = model(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5
    right = deepfool(Scaled(model, 1e3), x, labels, norm=norm, mode=mode)
    for factor in (1e-7, 1e-5, 1e-3, 1.0, 1e7, 1e12):
        hit = deepfool(Scaled(model, factor), x, labels, norm=norm, mode=mode)
        assert (hit.status == right.status).all()
        ratio = (hit.margin / right.margin)[right.margin.isfinite()]
        assert abs(float(ratio.median()) - 1) < 1e-3
        assert ratio.quantile(0.9) < 1.1
    for factor in (1e18, 1e25, 1e30, 1e37, 3e38):
        hit = deepfool(Scaled(model, factor), x, labels, norm=norm, mode=mode)
        wrong = torch.arange(40) % 5 == 0
        assert (hit.status[~wrong.numpy()] == "nan").all()
        assert hit.margin[~wrong].isnan().all()
        assert (hit.margin[wrong].isnan() | (hit.margin[wrong] == -torch.inf)).all()
    for factor in (1e-25, 1e-30, 1e-37):
        hit = deepfool(Scaled(model, factor), x, labels, norm=norm, mode=mode)
        assert (hit.status[~wrong.numpy()] == "no-gradient").all()
        assert (hit.margin[wrong] == -torch.inf).all()


def test_too_few_steps_is_unconverged_not_zero() -> None:
    model, x = Curved(seed=8).eval(), batch(60, 2)
    labels = model(x).argmax(1)
    short, long = (deepfool(model, x, labels, mode="deepfool", steps=steps) for steps in (1, 50))
    gave_up = short.status == "unconverged"
    assert gave_up.sum() > (long.status == "unconverged").sum()
    assert np.isnan(short.margin.numpy()[gave_up]).all()
    assert not (short.margin == 0).any()


def test_model_and_its_gradients_stay_untouched_and_empty_batches_work() -> None:
    model = Curved().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deepfool(model, batch(5), torch.zeros(5, dtype=torch.long))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    empty = deepfool(model, batch(0), torch.zeros(0, dtype=torch.long))
    assert len(empty.margin) == len(empty.status) == 0


def test_what_cannot_be_scored_is_refused() -> None:
    model, x, labels = Curved().eval(), batch(3), torch.zeros(3, dtype=torch.long)
    with pytest.raises(DataError, match="reach from 0 to 255"):
        deepfool(model, torch.tensor([0.0, 255.0]).view(1, 1, 1, 2).expand(3, 3, 2, 2)[:, :, :, :], labels)
    with pytest.raises(DataError, match="5 classes"):
        deepfool(model, x, labels + 5)
    with pytest.raises(DataError, match=r"int \[B\] is needed"):
        deepfool(model, x, labels[:2])
    with pytest.raises(UsageError, match="did you mean 'refined'"):
        deepfool(model, x, labels, mode="refine")
    with pytest.raises(ModelError, match="training mode"):
        deepfool(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3)).train(), x, labels)
    with pytest.raises(ModelError, match="logits of shape"):
        deepfool(nn.Flatten(0), x, labels)


def test_cost_follows_the_candidates_not_the_classes() -> None:
    x = batch(16)
    few, many = Curved(classes=6).eval(), Curved(classes=500).eval()
    cost = [deepfool(m, x, m(x).argmax(1), mode="fast").passes for m in (few, many)]
    assert cost[0] == cost[1] == (2 + 16 + 16, 3 * 16)  # the check; the images; one look each; 3 candidates
    for mode, candidates in (("refined", 4), ("tight", 5)):
        passes = deepfool(many, x, many(x).argmax(1), mode=mode).passes
        assert passes[1] <= 16 * (candidates + len(BUDGETS[mode].rotations) + 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from(["Linf", "L2"]))
def test_steps_reach_their_half_space_inside_the_box(rows, pixels, seed, norm) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, pixels, generator=generator).round(decimals=1)
    normal = torch.randn(rows, pixels, generator=generator) * (torch.rand(rows, pixels, generator=generator) < 0.8)
    room = torch.where(normal > 0, 1 - x, x)
    level = (normal.abs() * room).sum(1) * torch.rand(rows, generator=generator) * 0.95
    length, time = distances(x, normal.unsqueeze(1), level.unsqueeze(1), norm)
    step = displacement(x, normal, time.squeeze(1), norm)
    assert ((x + step >= -1e-6) & (x + step <= 1 + 1e-6)).all()
    reachable = level > 1e-4
    reached = (normal * step).sum(1)
    torch.testing.assert_close(reached[reachable], level[reachable], rtol=2e-3, atol=1e-5)
    size = step.abs().amax(1) if norm == "Linf" else step.norm(dim=1)
    torch.testing.assert_close(size[reachable], length.squeeze(1)[reachable], rtol=1e-3, atol=1e-5)
    assert torch.isinf(distances(x, normal.unsqueeze(1), level.unsqueeze(1) * 0 + 1e6, norm)[0]).all()


def test_front_door() -> None:
    assert puma.deepfool is deepfool


class Bent(nn.Module):
    """Two classes and one pixel, whose boundary lies farther out than it looks from 0.5, the more so the more bent."""

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        gone = x.flatten(1) - 0.5
        return torch.cat([torch.zeros_like(gone), gone - 0.1 - self.bend * gone**2], 1)


@pytest.mark.parametrize(("bend", "linearised"), [(0.0, 1), (0.15, 1), (1.0, 2)])
def test_a_step_that_falls_short_by_little_is_stretched_and_by_more_is_followed_by_another(bend, linearised) -> None:
    """The first step ends 1 % short with the small bend and 10 % short with the great one."""
    model = Bent(bend).eval()
    hit = deepfool(model, torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), norm="L2", mode="deepfool")
    exact = 0.1 if bend == 0 else (1 - (1 - 0.4 * bend) ** 0.5) / (2 * bend)
    assert (hit.status[0], int(hit.steps[0]), hit.passes[1]) == ("crossed", linearised, linearised)
    assert exact < float(hit.margin[0]) < 1.01 * exact


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_step_goes_to_the_nearest_half_space_also_where_the_box_decides_which_that_is(norm) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(400, 6, generator=generator).mul(1.6).sub(0.3).clamp(0, 1)  # a third of the pixels are 0 or 1
    normals = torch.randn(400, 4, 6, generator=generator)
    offsets = torch.rand(400, 4, generator=generator) * normals.abs().sum(-1) / 3
    normals[:9, 1] = 0.0
    offsets[20:30, 2] = -0.1
    length, time = distances(x, normals, offsets, norm)
    assert (length.isinf().sum(1) > 0).sum() > 50
    nearest = length.argmin(1)
    without_box = (offsets.clamp_min(0) / (normals.abs().sum(-1) if norm == "Linf" else normals.norm(dim=-1))).argmin(1)
    reachable = length.isfinite().any(1)
    assert ((nearest != without_box) & reachable).sum() > 40
    rows = torch.arange(400)
    wanted = displacement(x, normals[rows, nearest], time[rows, nearest], norm)
    step = step_to_nearest(x, normals, offsets, norm)
    torch.testing.assert_close(step[reachable], wanted[reachable], rtol=0, atol=0)
