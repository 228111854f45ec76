"""Networks that people bring: they train, or are refused before the first step; what they ask for is respected."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from puma.cli.app import app
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.devices import Devices
from puma.errors import ModelError, UsageError
from puma.models.checks import attack_mode
from puma.models.networks import build_model
from puma.models.weights import copy_network, load_model, load_weights, weights_sha256
from puma.threat import ThreatModel
from puma.training import run as runs
from puma.training.loop import Training, prepare, train
from puma.training.recipe import load_recipe
from puma.training.run import read_metrics

THREAT = ThreatModel("Linf", 0.2)
SHORT = load_recipe("digits", steps=3, batch_size=16, attack_steps=1, log_every=None)


@pytest.fixture(scope="module")
def pool():
    return Pool([load_dataset("digits")])


def network(norm="none", classes=10, **options):
    return build_model("small-cnn", classes, in_channels=1, image_size=8, norm=norm, **options)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.two.weight = self.one.weight

    def forward(self, images):
        return self.head(self.two(self.one(images.flatten(1)).relu()).relu())


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.unused = network(), nn.Linear(5, 5)

    def forward(self, images):
        return self.inner(images)


class OutputObject(WithUnused):
    """Logits inside a mapping, as Hugging Face's models return them; an empty and a scalar parameter; a counter."""

    def __init__(self):
        super().__init__()
        self.scale, self.empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images):
        self.calls += 1
        return {"logits": self.inner(images) * self.scale + self.empty.sum(), "loss": None}


def weight_normed():
    inner = nn.utils.weight_norm(nn.Linear(64, 10))
    model = nn.Sequential(nn.Flatten(), inner)
    model(torch.zeros(1, 1, 8, 8))  # it keeps a computed weight, which deepcopy refuses
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make", [Tied, WithUnused, OutputObject, weight_normed], ids=lambda make: make.__name__)
@pytest.mark.parametrize("changes", [{}, {"awp": 0.01}], ids=str)
def test_unusual_networks_train_are_saved_and_resumed(pool, tmp_path, make, changes):
    torch.manual_seed(0)
    model = make()
    recipe = SHORT.replace(**changes)
    run = train(model, pool, threat=THREAT, recipe=recipe, out=tmp_path)
    again = train(model, pool, threat=THREAT, recipe=recipe, out=tmp_path)
    assert weights_sha256(run.model) == weights_sha256(again.model) != weights_sha256(model)
    assert not list((tmp_path / "checkpoints").glob("trial*"))


def test_more_logits_than_classes(pool):
    run = train(network(classes=14), pool, threat=THREAT, recipe=SHORT)
    assert np.isfinite(run.metrics[-1]["loss"])


def fails_on_one(images):
    raise AssertionError("Input height (8) doesn't match model (224).")


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return fails_on_one(images)


class TwoArguments(Sized):
    def forward(self, images, labels):
        return images


def flat_batchnorm():
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))


def with_state(name, value):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            if isinstance(value, nn.Module):
                self.layer = value
            elif value is not None:
                self.register_buffer(name, value)

        def forward(self, images):
            return self.inner(images)

        def get_extra_state(self):
            return {"k": 3}

        def set_extra_state(self, state):
            pass

    if name != "extra":
        del Holding.get_extra_state, Holding.set_extra_state
    return Holding()


@pytest.mark.parametrize(
    ("model", "changes", "error", "said"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), {}, ModelError, "1.weight has no shape yet"),
        (lambda: with_state("wide", torch.zeros(1).expand(9)), {}, ModelError, "wide is an expanded tensor"),
        (
            lambda: with_state("phase", torch.zeros(2, dtype=torch.complex64)),
            {},
            ModelError,
            "phase is torch.complex64",
        ),
        (lambda: with_state("layer", nn.Embedding(3, 4, sparse=True)), {}, ModelError, "layer.weight gets sparse"),
        (lambda: with_state("extra", None), {}, ModelError, "_extra_state is a dict and no tensor"),
        (lambda: torch.tanh, {}, ModelError, "torch.nn.Module"),
        (lambda: torch.jit.trace(network(), torch.rand(1, 1, 8, 8)), {}, ModelError, "TorchScript"),
        (lambda: network().requires_grad_(False), {}, ModelError, "no parameter that takes a gradient"),
        (flat_batchnorm, {"batch_size": 1}, ModelError, "more than 1 value per channel"),
        (flat_batchnorm, {"micro_batch": 1}, ModelError, "more than 1 value per channel"),
        (Sized, {}, ModelError, "doesn't match model"),
        (TwoArguments, {}, ModelError, "labels"),
        (lambda: network(classes=9), {}, ModelError, "the model has 9 classes"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Converting a tensor")
def test_refused_before_the_first_step_with_the_reason(pool, tmp_path, model, changes, error, said):
    with pytest.raises((error, ModelError), match=said):
        train(model(), pool, threat=THREAT, recipe=SHORT.replace(**changes), out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_the_places_in_the_users_own_code_stand_below_the_error(pool):
    with pytest.raises(ModelError) as caught:
        train(Sized(), pool, threat=THREAT, recipe=SHORT)
    places = re.findall(r'File "(.+)", line \d+, in (\w+)', str(caught.value))
    assert places[-2:] == [(__file__, "forward"), (__file__, "fails_on_one")]
    assert not any("torch" in file or "puma/models" in file for file, _ in places)


def test_a_network_that_cannot_be_saved_is_refused_before_it_is_trained(pool, tmp_path):
    model = network()
    model.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(ModelError, match="cannot be saved"):
        train(model, pool, threat=THREAT, recipe=SHORT, out=tmp_path)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_frozen_layers_stay_and_so_does_their_mark(pool, tmp_path):
    model = network()
    model.features.requires_grad_(False)
    run = train(model, pool, threat=THREAT, recipe=SHORT.replace(awp=0.01, weight_decay=0.1))
    assert weights_sha256(run.model.features) == weights_sha256(model.features)
    assert weights_sha256(run.model.logits) != weights_sha256(model.logits)
    assert [p.requires_grad for p in run.model.parameters()] == [p.requires_grad for p in model.parameters()]
    train(model, pool, threat=THREAT, recipe=SHORT, out=tmp_path)
    with pytest.raises(Exception, match="frozen"):
        train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path)


def test_fine_tuning_with_another_head(pool, tmp_path):
    train(network(classes=12), pool, threat=THREAT, recipe=SHORT, out=tmp_path / "twelve")
    typed = ["train", "--real", "digits", "--threat", "Linf:0.2", "--model", "small-cnn", "--recipe", "digits"]
    typed += ["--set", "steps=1", "--set", "attack_steps=1", "--quiet", "--weights", str(tmp_path / "twelve")]
    refused = CliRunner().invoke(app, [*typed, "--out", str(tmp_path / "ten")])
    assert "shapes: logits.bias (12,) for (10,)" in str(refused.exception)
    done = CliRunner().invoke(app, [*typed, "--out", str(tmp_path / "ten"), "--new-head"])
    assert done.exit_code == 0, done.output
    assert load_model(tmp_path / "ten").logits.out_features == 10


class Counting(nn.Module):
    """A layer with statistics of its own that is no batch normalisation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, images):
        if self.training:
            self.mean += images.mean().detach()
            self.calls += 1
        return images - 0.1 * self.mean


@pytest.mark.parametrize("batchnorm", ["train", "eval", "unchanged"])
def test_an_attack_leaves_every_buffer_as_it_was(batchnorm):
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 10))
    model = nn.Sequential(Counting(), nn.BatchNorm2d(1), nn.Flatten(), normed).train()
    before = weights_sha256(model)
    with attack_mode(model, batchnorm):
        for _ in range(3):
            model(torch.rand(6, 1, 8, 8))
    assert weights_sha256(model) == before
    model(torch.rand(6, 1, 8, 8))
    assert weights_sha256(model) != before


def test_numpy_numbers_are_accepted(pool, tmp_path):
    recipe = load_recipe(
        "digits", steps=np.int64(2), batch_size=np.int32(16), attack_steps=1, learning_rate=np.float32(0.1)
    )
    given = {"recipe": recipe, "seed": np.int64(1), "validation": np.int64(20), "out": tmp_path}
    run = train("small-cnn", pool, threat=ThreatModel("Linf", np.float32(0.2)), **given)
    assert (run.meta["steps"], run.meta["validation_images"]) == (2, 20)
    again = train("small-cnn", pool, **{**given, "threat": f"Linf:{np.float32(0.2)}"})
    assert again.meta == run.meta


def test_class_names_are_kept_with_the_weights(pool, tmp_path):
    run = train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path)
    assert run.model.class_names == load_model(tmp_path).class_names == pool.class_names


# --- micro-batches, memory and time --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"objective": "mart"}, {"objective": "pgd-at"}, {"awp": 0.01}], ids=str)
def test_micro_batches_give_the_same_gradients(pool, changes):
    plain = {"schedule": "constant", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "ema": 0.0}
    models = []
    for micro in (None, 5):
        recipe = SHORT.replace(steps=1, micro_batch=micro, learning_rate=1.0, **plain, **changes)
        models.append(train(network("group"), pool, threat=THREAT, recipe=recipe).model)
    start = network("group").state_dict()
    for name, whole in models[0].state_dict().items():
        change = (whole - start[name]).abs().max()
        assert torch.allclose(models[1].state_dict()[name], whole, atol=2e-5 * float(1 + change)), name


def measured(pool, model, recipe=SHORT):
    return prepare(model, pool, THREAT, None, recipe, 0, None, Devices()).estimate()


def test_a_batch_that_does_not_fit_is_split_and_batch_statistics_are_named(pool, tmp_path, monkeypatch, caplog):
    need = measured(pool, network("batch")).memory
    monkeypatch.setattr(runs, "free_memory", lambda device: int(need))
    assert measured(pool, network("batch")).micro_batch == 8
    train(network("batch"), pool, threat=THREAT, recipe=SHORT, out=tmp_path)
    assert "micro-batches of 8: batch normalisation uses statistics of 8 images" in caplog.text
    monkeypatch.undo()  # with more memory the run goes on with the micro-batch that it began with
    (tmp_path / "last.safetensors").unlink()
    train(network("batch"), pool, threat=THREAT, recipe=SHORT, out=tmp_path)
    assert "micro_batch" in (tmp_path / "run.json").read_text()


def test_what_this_machine_cannot_do_is_refused_before_anything_is_made(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "free_memory", lambda device: 1000)
    with pytest.raises(UsageError, match=r"one step needs about .* GiB are free"):
        train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert train(network(), pool, threat=THREAT, recipe=SHORT, ignore_estimate=True).meta["steps"] == 3
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"would take about [\d,]+ days here"):
        train(network(), pool, threat=THREAT, recipe=SHORT.replace(steps=10**13), out=tmp_path / "r")


def test_the_default_recipe_on_a_processor_is_refused_within_seconds(pool):
    with pytest.raises(UsageError, match=r"GiB are free|days here"):
        train("wrn-28-10", pool, threat=THREAT, recipe="trades-edm", device="cpu", validation=0)


def test_the_estimate_counts_what_autograd_keeps():
    """A chain of sigmoids keeps one activation each, 64 floats an image; ReLU networks keep no more than that."""
    depth, images = 7, torch.rand(4, 1, 8, 8)
    model = nn.Sequential(nn.Flatten(), *(nn.Sigmoid() for _ in range(depth)), nn.Linear(64, 10))
    recipe = load_recipe("digits", objective="pgd-at", batch_size=1024)
    small, large = (
        runs.estimate(model, images, recipe.replace(batch_size=size), Devices()).memory for size in (1024, 4096)
    )
    each = (large - small) / 3072
    kept = depth * 64 * 4  # the linear layer's input is the last sigmoid's output
    assert each == pytest.approx(1.3 * kept + 8 * 64 * 4, rel=0.05)


def test_a_dry_run_says_what_it_costs_and_writes_nothing(tmp_path):
    typed = ["train", "--real", "digits", "--threat", "Linf:0.2", "--model", "small-cnn", "--recipe", "digits"]
    result = CliRunner().invoke(app, [*typed, "--out", str(tmp_path / "r"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert re.search(r"about [\d.]+ \w+ for 500 steps of 128 images", result.output)
    assert "GiB of free memory" in result.output
    assert not (tmp_path / "r").exists()


def test_copies_of_networks_are_independent():
    model = network()
    copied = copy_network(model)
    load_weights(copied, network(seed=3).state_dict())
    assert weights_sha256(copied) != weights_sha256(model)


# --- loggers and metrics -------------------------------------------------------------------------------------------


def wandb(monkeypatch, init) -> None:
    package = ModuleType("wandb")
    package.__spec__, package.init = SimpleNamespace(), init
    monkeypatch.setitem(sys.modules, "wandb", package)


def test_metrics_go_to_weights_and_biases(pool, tmp_path, monkeypatch):
    sent, settings, ended = [], [], []

    def init(**given):
        settings.append(given)
        return SimpleNamespace(log=lambda data, step: sent.append((step, data)), finish=lambda: ended.append(True))

    wandb(monkeypatch, init)
    train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path / "r", logger="wandb")
    rows = read_metrics(tmp_path / "r" / "metrics.csv")
    assert [step for step, _ in sent] == [row["step"] for row in rows] == [1, 2, 3]
    assert sent[-1][1]["train/loss"] == pytest.approx(rows[-1]["loss"])
    assert settings[0]["resume"] == "allow"
    assert ended == [True]


def test_a_logger_that_cannot_be_started_is_an_error_with_its_reason(pool, tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)\nand more")

    wandb(monkeypatch, init)
    with pytest.raises(UsageError, match="logger wandb cannot be started") as caught:
        train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path / "r", logger="wandb")
    assert "api_key not configured (no-tty)" in str(caught.value)


def test_metrics_go_to_mlflow_into_the_same_run_when_resumed(pool, tmp_path, monkeypatch):
    sent, runs, active = [], {}, []

    def search_runs(filter_string, output_format):
        key = filter_string.split("'")[1]
        return [SimpleNamespace(info=SimpleNamespace(run_id=runs[key]))] if key in runs else []

    def start_run(run_id, run_name, tags):
        assert not active  # as in mlflow: one run at a time
        active.append(runs.setdefault(tags["puma"], f"run{len(runs)}"))
        assert run_id in (None, active[0])

    mlflow = ModuleType("mlflow")
    mlflow.__spec__ = SimpleNamespace()
    mlflow.search_runs, mlflow.start_run, mlflow.end_run = search_runs, start_run, active.clear
    mlflow.log_metrics = lambda metrics, step: sent.append((active[0], step))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path, logger="mlflow")
    (tmp_path / "last.safetensors").unlink()
    for state in (tmp_path / "checkpoints").glob("*"):
        state.unlink()
    train(network(), pool, threat=THREAT, recipe=SHORT, out=tmp_path, logger="mlflow")
    assert sent == [("run0", step) for step in [1, 2, 3] * 2]


@pytest.mark.parametrize(
    ("logger", "out", "said"),
    [
        ("wandb", "r", "needs the package wandb"),
        ("comet", "r", "unknown logger 'comet'"),
        ("tensorboard", None, "output"),
    ],
)
def test_a_logger_that_cannot_be_used_is_refused_first(pool, tmp_path, monkeypatch, logger, out, said):
    monkeypatch.setattr("puma.training.run.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(UsageError, match=said):
        train(network(), pool, threat=THREAT, recipe=SHORT, out=out and tmp_path / out, logger=logger)
    assert not (tmp_path / "r").exists()


def test_rows_of_metrics_follow_the_number_of_steps():
    rows = {steps: steps // load_recipe("digits", steps=steps, log_every=None).log_interval for steps in (3, 40, 5000)}
    assert rows == {3: 3, 40: 20, 5000: 100}


def test_progress_shows_loss_and_accuracies(pool, capsys, monkeypatch):
    monkeypatch.setenv("PUMA_PROGRESS_SECONDS", "0")
    job = prepare(network(), pool, THREAT, None, SHORT, 0, None, Devices())
    Training(job).run(progress=True)
    assert re.search(r"images/s, loss \d+\.\d+, clean [\d.]+%, adversarial [\d.]+%", capsys.readouterr().err)
