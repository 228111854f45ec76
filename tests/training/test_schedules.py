"""Schedules and averaging against torch's own and against plain loops."""

from __future__ import annotations

import pytest
import torch

from puma.models.networks import build_model
from puma.models.weights import EMA
from puma.training.optim import build_sgd, ema_decay, learning_rate, momentum
from puma.training.recipe import load_recipe


@pytest.mark.parametrize(
    ("steps", "every", "warmup"), [(400, 1, 0.025), (4000, 10, 0.1), (405, 10, 0.3), (39200, 98, 0.025)]
)
def test_one_cycle_is_torchs(steps, every, warmup):
    recipe = load_recipe("trades-edm", steps=steps, schedule_every=every, warmup=warmup)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2, momentum=0.9)
    total = -(-steps // every)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, pct_start=warmup, total_steps=total)
    for epoch in range(total):
        group = optimizer.param_groups[0]
        for step in {epoch * every, min(epoch * every + every - 1, steps - 1)}:
            assert learning_rate(recipe, step) == pytest.approx(group["lr"], rel=1e-9)
            assert momentum(recipe, step) == pytest.approx(group["momentum"], rel=1e-9)
        optimizer.step()
        if epoch < total - 1:
            scheduler.step()


def test_momentum_stays_where_it_is_not_cycled():
    recipe = load_recipe("trades-edm", cycle_momentum=False, momentum=0.9)
    assert {momentum(recipe, step) for step in (0, 500, 30000)} == {0.9}


def test_the_rate_falls_tenfold_at_milestones():
    recipe = load_recipe("pgd-at")
    assert [learning_rate(recipe, s) for s in (0, 39999, 40000, 59999, 60000)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )


def test_ema_decay_as_the_published_code():
    """wa: decay 0 before 2.5 % of the steps (980 of 39,200), then min(0.995, (1 + d) / (10 + d)), 0.995 at d = 1790."""
    recipe = load_recipe("trades-edm")
    assert [ema_decay(recipe, step) for step in (1, 979)] == [0, 0]
    assert ema_decay(recipe, 980) == pytest.approx(0.1)
    assert ema_decay(recipe, 980 + 90) == pytest.approx(91 / 100)
    assert ema_decay(recipe, 980 + 1789) < 0.995
    assert ema_decay(recipe, 980 + 1790) == ema_decay(recipe, 39200) == 0.995
    assert ema_decay(load_recipe("trades-edm", ema_ramp=False), 980) == 0.995
    assert ema_decay(load_recipe("trades"), 100) == 0


def test_average_against_a_plain_loop():
    recipe = load_recipe("digits", ema=0.8)
    model = build_model("small-cnn", 10, in_channels=1, image_size=8, norm="batch")
    average = EMA(model)
    slow = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 6):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step)))
        average.update(model, ema_decay(recipe, step))
        decay = min(0.8, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        for name, value in model.state_dict().items():
            if name in parameters:
                slow[name] = decay * slow[name] + (1 - decay) * value
            else:
                slow[name] = value.clone()
    average.copy_buffers(model)
    assert not average.model.training
    for name, value in average.model.state_dict().items():
        assert torch.allclose(value, slow[name], atol=1e-5), name
    before = average.model.state_dict()["logits.bias"].clone()
    with torch.no_grad():
        model.logits.bias.add_(1)
    assert torch.equal(average.model.state_dict()["logits.bias"], before)  # a copy, not an alias


def test_weight_decay_spares_batch_normalisation_only_where_asked():
    model = build_model("wrn-10-1", 10)
    (everything,) = build_sgd(model, load_recipe("digits")).param_groups
    assert len(everything["params"]) == len(list(model.parameters()))
    decayed, spared = build_sgd(model, load_recipe("trades-edm")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {name for name in names.values() if "batchnorm" in name}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    assert "logits.bias" in {names[id(p)] for p in decayed["params"]}  # other biases are decayed
