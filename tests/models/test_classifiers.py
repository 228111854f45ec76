"""Networks: parameter counts, shapes, seeds, and RobustBench's names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from puma.errors import ModelError, UsageError
from puma.models.networks import build_model
from puma.models.weights import load_model, save_model, weights_sha256
from puma.models.zoo import from_robustbench, resolve_model, to_robustbench


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("wrn-28-10", {}, 36_479_194),
        ("wrn-34-10", {}, 46_160_474),
        ("preactresnet-18", {}, 12_548_426),
        ("small-cnn", {"in_channels": 1, "image_size": 8}, 19_178),
    ],
)
def test_parameter_counts(name, options, parameters):
    model = build_model(name, 10, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", ["wrn-10-1", "preactresnet-18", "preactresnet-34", "small-cnn"])
def test_logits_and_gradients_reach_every_parameter(name, activation):
    model = build_model(name, 7, activation=activation)
    logits = model(torch.rand(3, 3, 32, 32))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("size", [8, 12, 16, 20, 28, 32])
def test_small_cnn_takes_8_to_32_pixels(size):
    assert build_model("small-cnn", 10, in_channels=1, image_size=size)(torch.rand(2, 1, size, size)).shape == (2, 10)


def test_weights_follow_the_seed_and_leave_the_global_generators_alone(monkeypatch):
    before, seeded = torch.random.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    first, again, other = (build_model("small-cnn", 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not seeded  # the generators of GPUs
    assert weights_sha256(first) == weights_sha256(again) != weights_sha256(other)


def test_numpy_numbers_are_numbers(tmp_path):
    sizes = {"in_channels": np.int64(1), "image_size": np.int32(8), "seed": np.int64(2)}
    model = build_model("small-cnn", np.int64(10), **sizes)
    save_model(model, tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").config == model.config
    with pytest.raises(TypeError):
        build_model("small-cnn", 10.5)


def test_normalisation_is_inside():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    inside = build_model("wrn-10-1", 10, mean=mean, std=std).eval()
    outside = build_model("wrn-10-1", 10, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    images = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    assert torch.allclose(inside(images), outside(by_hand), atol=1e-6)


def test_padding_of_a_strided_convolution():
    """It pads right and bottom only, as TensorFlow does."""
    kernel = build_model("wrn-10-1", 10).layer[1].block[0].conv_0
    image = torch.randn(1, kernel.in_channels, 8, 8)
    slow = torch.zeros(1, kernel.out_channels, 4, 4)
    padded = torch.zeros(1, kernel.in_channels, 9, 9)
    padded[:, :, :8, :8] = image
    for y in range(4):
        for x in range(4):
            patch = padded[:, :, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
            slow[0, :, y, x] = (kernel.weight * patch).sum((1, 2, 3))
    assert torch.allclose(kernel(image), slow, atol=1e-5)


def test_normalisation_is_the_same_bits_in_either_memory_format():
    images = torch.rand(5, 3, 8, 8, requires_grad=True)
    normalise = build_model("wrn-10-1", 10).normalise
    expected = (images - normalise.mean) / normalise.std
    spread = normalise(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(spread, expected)
    assert torch.equal(torch.autograd.grad(spread.sum(), images)[0], torch.autograd.grad(expected.sum(), images)[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("wrn-27-10", 10), "no WRN-27-10"),
        (("resnet-18", 10), "unknown model 'resnet-18'"),
        (("wrn-28-10", 1), "not a classification"),
    ],
)
def test_what_cannot_be_built(arguments, said):
    with pytest.raises(UsageError, match=said):
        build_model(*arguments)


def test_misspelt_option_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'activation'"):
        build_model("wrn-10-1", 10, activaton="relu")
    with pytest.raises(UsageError, match="unknown activation 'sillu'"):
        build_model("wrn-10-1", 10, activation="sillu")


def test_dm_networks_carry_robustbench_names():
    wide = to_robustbench(build_model("wrn-28-10", 10))
    assert (wide.architecture, len(wide.weights)) == ("DMWideResNet", 155)
    assert wide.arguments["depth"] == 28
    assert wide.arguments["activation_fn"] == "SiLU"
    keys = {"init_conv.weight", "layer.2.block.3.conv_1.weight", "layer.0.block.0.shortcut.weight", "batchnorm.bias"}
    assert keys <= wide.weights.keys()
    assert not {"mean", "std", "normalise.mean"} & wide.weights.keys()
    assert not [key for key in wide.weights if "module." in key or "model." in key]  # RobustBench would chop the key
    pre = to_robustbench(build_model("preactresnet-18", 10))
    assert pre.architecture == "DMPreActResNet"
    assert {
        "conv_2d.weight",
        "layer_3.1.conv_2d_2.weight",
        "layer_1.0.shortcut.weight",
        "logits.bias",
    } <= pre.weights.keys()


def test_normalisation_in_old_files_is_taken_over():
    model = build_model("wrn-10-1", 10, mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3)).eval()
    weights = {**model.state_dict(), "mean": model.normalise.mean[0], "std": model.normalise.std[0]}
    back = from_robustbench(weights, "wrn-10-1")
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(back(images), model(images), atol=1e-6)


def test_what_robustbench_cannot_express_is_refused():
    with pytest.raises(ModelError, match="no class for small-cnn"):
        to_robustbench(build_model("small-cnn", 10))


def test_resolve(tmp_path, monkeypatch):
    assert resolve_model("wrn-10-1", num_classes=4).config["num_classes"] == 4
    (tmp_path / "my_networks.py").write_text(
        "import torch\ndef linear():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert resolve_model("my_networks:linear")(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    for spec, said in (
        ("my_networks:nothing", "not a torch.nn.Module"),
        ("my_networks:other", "cannot find"),
        ("no/w.safetensors", "do not exist"),
    ):
        with pytest.raises(ModelError, match=said):
            resolve_model(spec)
