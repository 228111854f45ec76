"""Training: against a plain loop in the published code's order, and what a run leaves behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.devices import Devices
from puma.errors import CheckError, DataError, ModelError, ResumeError, UsageError
from puma.io import lock
from puma.models.networks import build_model
from puma.models.weights import load_model, weights_sha256
from puma.plan import Plan
from puma.threat import ThreatModel
from puma.training.batches import Validation, held_out
from puma.training.loop import Training, prepare, train
from puma.training.optim import AWP
from puma.training.recipe import load_recipe
from puma.training.run import read_metrics

THREAT = ThreatModel("Linf", 0.2)
SHORT = load_recipe("digits", steps=6, batch_size=32, log_every=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def pool():
    return Pool([load_dataset("digits"), load_dataset("digits:test")])


def network(norm="none", classes=10):
    return build_model("small-cnn", classes, in_channels=1, image_size=8, norm=norm)


def plan_of(pool, keep=None, eps=None, weight=None, threat=THREAT):
    keep = np.ones(len(pool), dtype=bool) if keep is None else keep
    eps = np.where(keep, threat.eps, 0).astype(np.float32) if eps is None else eps
    meta = {"strategy": "none", "threat": {"norm": threat.norm, "eps": threat.eps}, "pool": pool.describe()}
    return Plan(keep, eps, meta, beta=weight)


def plain_loop(pool, recipe, model, steps):
    """TRADES as Wang et al. 2023 write it: statistics toggled by hand, two forward passes, EMA over parameters."""
    job = prepare(model, pool, THREAT, None, recipe, 0, None, Devices())
    live, average = job.network.train(), prepare(model, pool, THREAT, None, recipe, 0, None, Devices()).network
    norms = [m for m in live.modules() if isinstance(m, nn.BatchNorm2d)]
    inside = {id(p) for m in norms for p in m.parameters()}
    groups = [
        {"params": [p for p in live.parameters() if id(p) not in inside]},
        {"params": [p for p in live.parameters() if id(p) in inside], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, weight_decay=5e-4, momentum=0.9, nesterov=True)
    total = -(-recipe.steps // recipe.schedule_every)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, pct_start=recipe.warmup, total_steps=total
    )
    for step in range(steps):
        for module in norms:
            module.momentum = 1.0 if step == 0 else 0.01
            module.track_running_stats = False
        batch = job.batches.get(step)
        x, y = batch.images, batch.labels
        adversarial = (x + batch.noise * 0.2).clamp(0, 1)
        p_natural = F.softmax(live(x), dim=1).detach()
        for _ in range(10):
            adversarial.requires_grad_()
            loss = F.kl_div(F.log_softmax(live(adversarial), dim=1), p_natural, reduction="batchmean")
            (gradient,) = torch.autograd.grad(loss, adversarial)
            adversarial = adversarial.detach() + 0.05 * gradient.sign()
            adversarial = torch.min(torch.max(adversarial, x - 0.2), x + 0.2).clamp(0, 1)
        for module in norms:
            module.track_running_stats = True
        optimizer.zero_grad()
        natural, attacked = live(x), live(adversarial)
        robust = F.kl_div(F.log_softmax(attacked, 1), F.softmax(natural, 1), reduction="batchmean")
        (F.cross_entropy(natural, y, label_smoothing=0.1) + 5.0 * robust).backward()
        optimizer.step()
        delta = step + 1 - recipe.ema_warmup * recipe.steps
        decay = min(0.995, (1 + delta) / (10 + delta)) * (delta >= 0)
        for own, new in zip(average.parameters(), live.parameters(), strict=True):
            own.data = own.data * decay + new.data * (1 - decay)
        if (step + 1) % recipe.schedule_every == 0:
            schedule.step()
    for own, new in zip(average.buffers(), live.buffers(), strict=True):
        own.copy_(new)
    return average.eval()


def test_the_published_recipe_step_by_step(pool):
    changes = {
        "steps": 8,
        "batch_size": 64,
        "schedule_every": 2,
        "warmup": 0.4,
        "ema_warmup": 0.25,
        "validation_images": 0,
    }
    recipe = load_recipe("trades-edm", **changes, crop=0, flip=False, learning_rate=0.05)
    run = train(network("batch"), pool, threat=THREAT, recipe=recipe)
    slow = plain_loop(pool, recipe, network("batch"), 8)
    for (name, fast), reference in zip(run.model.state_dict().items(), slow.state_dict().values(), strict=True):
        assert torch.allclose(fast.float(), reference.float(), atol=2e-4, rtol=1e-3), name
    images = torch.rand(50, 1, 8, 8)
    assert torch.allclose(run.model(images), slow(images), atol=2e-3)


def test_a_run_leaves_what_the_design_says(pool, tmp_path):
    recipe = SHORT.replace(validation_images=60, validation_every=3)
    keep = np.arange(len(pool)) % 3 > 0
    model = network()
    before = weights_sha256(model)
    run = train(model, pool, threat=THREAT, plan=plan_of(pool, keep), recipe=recipe, out=tmp_path / "r")
    assert weights_sha256(model) == before
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert {"recipe.toml", "run.json", "metrics.csv", "last.safetensors", "best.safetensors", "checkpoints"} <= names
    assert load_recipe(tmp_path / "r" / "recipe.toml").replace(name="digits") == recipe
    states = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir())
    assert states == ["state-000000004.safetensors", "state-000000006.safetensors"]
    rows = read_metrics(tmp_path / "r" / "metrics.csv")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert [row["draws"] for row in rows] == [64, 96, 128, 192]
    assert [row["step"] for row in rows if "validation_robust" in row] == [3, 6]
    assert run.meta["trained_on"] == keep.sum() - sum(keep[held_out_rows(pool, 60)])
    assert run.meta["validation_images"] == 60
    assert rows[-1]["unique_images"] == run.meta["unique_images"] <= 192
    assert run.meta["best_step"] in (3, 6)
    assert weights_sha256(load_model(tmp_path / "r")) == weights_sha256(run.model)
    again = train(network(), pool, threat=THREAT, plan=plan_of(pool, keep), recipe=recipe, out=tmp_path / "r")
    assert weights_sha256(again.model) == weights_sha256(run.model)
    assert again.meta == run.meta


def held_out_rows(pool, count):
    return held_out(pool, count, 0)


def test_validation_rows_are_real_stratified_and_never_drawn(pool):
    rows = held_out_rows(pool, 100)
    assert len(set(rows)) == 100
    assert not pool.synthetic[rows].any()
    real = np.bincount(pool.labels[~pool.synthetic], minlength=10) * 100 / np.count_nonzero(~pool.synthetic)
    assert np.abs(np.bincount(pool.labels[rows], minlength=10) - real).max() <= 1
    job = prepare(network(), pool, THREAT, None, SHORT, 0, 100, Devices())
    drawn = {int(row) for step in range(200) for row in job.batches.sampler.indices(step)}
    assert not drawn & set(rows.tolist())
    assert {row for row in drawn if not pool.synthetic[row]} == set(np.flatnonzero(~pool.synthetic)) - set(
        rows.tolist()
    )


def test_only_kept_rows_are_drawn_and_batches_keep_their_share(pool):
    keep = np.random.default_rng(0).random(len(pool)) < 0.3
    job = prepare(network(), pool, THREAT, plan_of(pool, keep), SHORT, 0, None, Devices())
    for step in range(60):
        rows = job.batches.sampler.indices(step)
        assert keep[rows].all()
        assert pool.synthetic[rows].sum() == int(32 * 0.7)


def test_best_is_the_best_on_validation_with_the_latest_of_equals(pool, monkeypatch):
    scores = iter([(0.9, 0.3), (0.9, 0.5), (0.9, 0.5), (0.9, 0.1)])
    monkeypatch.setattr(Validation, "measure", lambda self, model: next(scores))
    recipe = SHORT.replace(steps=8, validation_images=60, validation_every=2)
    run = train(network(), pool, threat=THREAT, recipe=recipe)
    assert (run.meta["best_step"], run.meta["best_validation"]) == (6, 0.5)
    assert weights_sha256(run.best) != weights_sha256(run.model)
    # the averaged network after six steps of the same recipe, schedule included
    monkeypatch.undo()
    assert weights_sha256(run.best) == weights_sha256(_stopped(pool, recipe, 6))


def started(pool, recipe, model=None):
    training = Training(prepare(model or network(), pool, THREAT, None, recipe, 0, None, Devices()))
    training.network.train()
    return training


def _stopped(pool, recipe, steps):
    training = started(pool, recipe.replace(validation_images=60))
    for step in range(steps):
        training.take_step(step)
    return training.averaged()


def test_eps_zero_everywhere_is_plain_training(pool):
    """With every radius 0 the weight of the adversarial term and the attack cannot matter, not even in one bit."""
    plan = plan_of(pool, eps=np.zeros(len(pool), dtype=np.float32))
    runs = [
        train(network("batch"), pool, threat=THREAT, plan=plan, recipe=SHORT.replace(beta=w, attack_steps=n))
        for w, n in ((5.0, 3), (0.0, 1))
    ]
    assert weights_sha256(runs[0].model) == weights_sha256(runs[1].model)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_one_clean_pass_for_attack_and_loss_is_two_to_the_bit(pool, norm):
    weights = set()
    for shared in (True, False):
        training = started(pool, SHORT, network(norm))
        assert training.shares_clean_pass
        training.shares_clean_pass = shared
        for step in range(SHORT.steps):
            training.take_step(step)
        weights.add(weights_sha256(training.averaged()))
    assert len(weights) == 1


@pytest.mark.parametrize(
    "changes",
    [{"attack_batchnorm": "eval"}, {"objective": "mart"}, {"objective": "pgd-at"}, {"awp": 0.1}],
    ids=str,
)
def test_the_clean_pass_is_not_shared_where_it_would_be_another(pool, changes):
    assert not started(pool, SHORT.replace(**changes)).shares_clean_pass
    assert started(pool, SHORT).shares_clean_pass
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))
    assert not started(pool, SHORT, dropping).shares_clean_pass


def test_a_compiled_network_trains_to_the_same(pool, monkeypatch):
    """Batch statistics, frozen parameters and eval mode come and go in a step: the graph has to follow all of them."""
    recipe = SHORT.replace(validation_images=40, validation_every=3, validation_steps=2)
    plain = train(network("batch"), pool, threat=THREAT, recipe=recipe)
    from torch._dynamo.testing import CompileCounterWithBackend

    compile_, backend = torch.compile, CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)  # else it would go on uncompiled
    monkeypatch.setattr(torch, "compile", lambda module: compile_(module, backend=backend))
    compiled = train(network("batch"), pool, threat=THREAT, recipe=recipe.replace(compile=True))
    assert backend.frame_count >= 2  # in the attack and in the loss
    for (name, fast), slow in zip(compiled.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.allclose(fast, slow, atol=1e-4, rtol=1e-3), name


def test_a_step_costs_26_forward_passes_and_27_in_the_published_structure():
    """1 + 10 * 2 + 2 * 3, of which we save a clean pass; less the gradient to the pixels, which no loss needs."""
    place = Path(__file__).parents[2] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("training_benchmark", place)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    pool, recipe = benchmark.random_pool(32), load_recipe("trades-edm", batch_size=8, steps=100)
    ours = benchmark.Ours(build_model("small-cnn", 10, norm="batch"), pool, recipe)
    plain = benchmark.PlainLoop(build_model("small-cnn", 10, norm="batch"), pool, 8)
    first = 16 * 16**2 * 27  # multiplications of each convolution for one image of 32 pixels
    pixels = 2 * first / (first + 32 * 8**2 * 16 * 9 + 32 * 4**2 * 32 * 9)
    assert benchmark.work_of(ours, ours.training.network, 8)[1] == pytest.approx(26 - pixels)
    assert benchmark.work_of(plain, plain.model, 8)[1] == pytest.approx(27 - pixels)


def test_a_plan_may_set_beta(pool):
    heavy = train(network(), pool, threat=THREAT, recipe=SHORT.replace(beta=2.0))
    planned = train(network(), pool, threat=THREAT, recipe=SHORT, plan=plan_of(pool, weight=2.0))
    assert weights_sha256(heavy.model) == weights_sha256(planned.model)
    assert weights_sha256(heavy.model) != weights_sha256(train(network(), pool, threat=THREAT, recipe=SHORT).model)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "pgd-at"},
        {"objective": "mart"},
        {"awp": 0.01},
        {"precision": "bf16"},
        {"ema": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("threat", [THREAT, ThreatModel("L2", 1.0)], ids=str)
def test_other_objectives_learn(pool, changes, threat):
    recipe = SHORT.replace(steps=40, batch_size=64, attack_steps=2, learning_rate=0.03, log_every=10, **changes)
    rows = train(network("batch"), pool, threat=threat, recipe=recipe).metrics
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["adversarial_accuracy"] > rows[0]["adversarial_accuracy"]


def test_the_gradient_is_clipped_to_its_norm(pool):
    plain = {"schedule": "constant", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "learning_rate": 0.5}
    moved = {}
    for longest in (1e-3, 1e6, None):
        training = started(pool, SHORT.replace(clip_gradient=longest, **plain))
        before = [parameter.detach().clone() for parameter in training.network.parameters()]
        training.take_step(0)
        steps = [p.detach() - old for p, old in zip(training.network.parameters(), before, strict=True)]
        moved[longest] = float(torch.cat([step.flatten() for step in steps]).norm())
    assert moved[1e-3] == pytest.approx(0.5e-3, rel=1e-2)
    assert moved[1e6] == pytest.approx(moved[None], rel=1e-5)
    assert moved[None] > 1e-2


def test_weight_perturbation_is_undone_to_the_bit():
    model, images, labels = network(), torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    loss = lambda: F.cross_entropy(model(images), labels)  # noqa: E731
    before, at_rest = weights_sha256(model), loss().item()
    moved = AWP(model, 0.01, Devices())
    gradients = torch.autograd.grad(loss(), model.logits.weight)[0]
    old = model.logits.weight.detach().clone()
    moved.add(loss)
    change = model.logits.weight.detach() - old
    assert torch.allclose(change, gradients * 0.01 * old.norm() / gradients.norm(), atol=1e-7)
    assert loss().item() > at_rest
    moved.remove()
    assert weights_sha256(model) == before


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()
        self.calls = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.inner(images) + self.calls * 0


def test_nan_stops_before_the_step(pool, tmp_path):
    job = prepare(Exploding(), pool, THREAT, None, SHORT, 0, None, Devices())
    training = Training(job, tmp_path)
    training.network.train()
    training.take_step(0)
    training.checkpoint()
    with torch.no_grad():
        training.network.calls.fill_(float("nan"))
    before = weights_sha256(training.network)
    with pytest.raises(CheckError, match="infinite or NaN") as caught:
        training.take_step(1)
    assert caught.value.exit_code == 7
    assert weights_sha256(training.network) == before
    with pytest.raises(CheckError):  # and a network in this state is never written
        training.checkpoint()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["state-000000001.safetensors"]


class Rooted(nn.Module):
    """Its loss is finite and its gradient is not: the slope of the square root at 0 is inf, and inf * 0 is NaN."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = network(), nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return self.inner(images) + self.scale.sqrt() * 0


def test_a_gradient_that_is_nan_under_a_finite_loss_stops_before_the_step(pool, tmp_path):
    with pytest.raises(CheckError, match="its gradient became infinite or NaN by step 0"):
        train(Rooted(), pool, threat=THREAT, recipe=SHORT, out=tmp_path)
    assert not list(tmp_path.glob("**/*.safetensors"))


def _other_pool():
    return Pool([load_dataset("digits:test")])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (lambda p: {"plan": plan_of(_other_pool())}, DataError, "the plan has 899 rows, the pool 1,797"),
        (
            lambda p: {"plan": plan_of(Pool([load_dataset("digits:test"), load_dataset("digits")]))},
            DataError,
            "made for another pool",
        ),
        (lambda p: {"plan": plan_of(p, threat=ThreatModel("Linf", 0.1))}, DataError, "made for Linf:0.1"),
        (lambda p: {"model": network(classes=9)}, ModelError, "the model has 9 classes, the data 10"),
        (lambda p: {"model": build_model("small-cnn", 10)}, ModelError, "the model fails on images"),
        (lambda p: {"recipe": SHORT.replace(batch_size=5000)}, UsageError, "larger than the 1,797"),
        (lambda p: {"validation": 600}, UsageError, "more than half of the 898"),
        (lambda p: {"device": "tpu"}, UsageError, "tpu"),
        (lambda p: {"recipe": "trades-emd"}, UsageError, "did you mean 'trades-edm'"),
    ],
)
def test_refused_before_any_compute(pool, tmp_path, arguments, error, said):
    given = {"model": network(), "pool": pool, "threat": THREAT, "recipe": SHORT, "out": tmp_path / "r"} | arguments(
        pool
    )
    with pytest.raises(error, match=said):
        train(given.pop("model"), given.pop("pool"), **given)
    assert not (tmp_path / "r" / "run.json").exists()


def test_other_settings_and_a_second_writer_are_refused(pool, tmp_path):
    train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path)
    with pytest.raises(ResumeError, match=r"recipe.learning_rate: 0.1 there, 0.2 now; seed: 0 there, 1 now"):
        train(network(), pool, threat=THREAT, recipe=SHORT.replace(learning_rate=0.2), out=tmp_path, seed=1)
    with lock(tmp_path), pytest.raises(ResumeError, match="another process"):
        train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path)
