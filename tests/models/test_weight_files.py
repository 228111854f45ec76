"""Weights on disk: whole, checked, never unpickled."""

from __future__ import annotations

import pickle
import resource
import time

import pytest
import torch
from safetensors.torch import save_file

from puma.errors import ModelError
from puma.models.networks import build_model
from puma.models.weights import (
    SCHEMA,
    load_model,
    load_tensors,
    load_weights,
    save_model,
    save_tensors,
    weights_sha256,
)


@pytest.fixture
def model():
    return build_model("small-cnn", 10, in_channels=1, image_size=8, norm="batch", seed=3)


def test_there_and_back(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors", note="kept")
    back = load_model(tmp_path / "m.safetensors")
    assert back.config == model.config
    assert not back.training
    assert weights_sha256(back) == weights_sha256(model)
    assert not list(tmp_path.glob(".*"))


def test_digest_ignores_memory_format_but_no_bit(model):
    digest = weights_sha256(model)
    assert weights_sha256(model.to(memory_format=torch.channels_last)) == digest
    with torch.no_grad():
        model.logits.bias[0] = torch.nextafter(model.logits.bias[0], torch.tensor(1.0))
    assert weights_sha256(model) != digest


def test_every_flipped_bit_is_noticed(model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    whole = path.read_bytes()
    places = torch.linspace(9, len(whole) - 1, 60).long().tolist()  # header and tensors
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ModelError):
            load_model(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(path)


def test_a_header_length_that_looks_like_a_pickle(model, tmp_path):
    """The first byte is the low byte of the header's length: some lengths start like a pickle."""
    seen = 0
    for padding in range(0, 264, 8):
        save_model(torch.nn.Linear(1, 1), tmp_path / "m.safetensors", note="x" * padding)
        if (tmp_path / "m.safetensors").read_bytes()[:1] == b"\x80":
            seen += 1
            tensors, _ = load_tensors(tmp_path / "m.safetensors", SCHEMA)
            assert tensors["weight"].shape == (1, 1)
    assert seen > 0


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_are_refused_and_never_run(writer, tmp_path):
    target = tmp_path / "executed"
    path = tmp_path / "weights.pt"
    writer({"state": _Bomb(target)}, path)
    with pytest.raises(ModelError, match="pickled"):
        load_model(path)
    assert not target.exists()


def test_other_architecture_names_keys(model):
    weights = model.state_dict()
    weights["extra"] = weights.pop("logits.bias")
    with pytest.raises(ModelError, match=r"missing: logits.bias; unexpected: extra"):
        load_weights(model, weights)
    with pytest.raises(ModelError, match=r"shapes: features.0.weight \(16, 1, 3, 3\) for \(16, 3, 3, 3\)"):
        load_weights(build_model("small-cnn", 10, image_size=8, norm="batch"), model.state_dict())


def test_foreign_model_cannot_be_built_again(tmp_path):
    save_model(torch.nn.Linear(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="factory"):
        load_model(tmp_path / "m.safetensors")


def _forged(path, **config):
    save_tensors({"logits.weight": torch.zeros(2, 2)}, path, SCHEMA, {"config": config})
    return path


@pytest.mark.parametrize(
    "config",
    [
        {"name": "wrn-28-100000", "num_classes": 10},
        {"name": "wrn-600004-10", "num_classes": 10},
        {"name": "wrn-28-10", "num_classes": 10**13},
        {"name": "small-cnn", "num_classes": 10, "in_channels": 10**10, "image_size": 8},
        {"name": "small-cnn", "num_classes": 10, "in_channels": 1, "image_size": 8, "widths": [10**6] * 3},
        {"name": "small-cnn", "num_classes": "ten"},
        {"name": "small-cnn", "num_classes": 10, "widths": "wide"},
        {"name": ["small-cnn"], "num_classes": 10},
        {"name": "small-cnn", "num_classes": 10, "mean": {"red": 0.5}},
        {"num_classes": 10},
        {"name": "timm:hf-hub:somebody/something", "num_classes": 10},
    ],
    ids=str,
)
def test_a_forged_configuration_is_refused_at_once_and_in_little_memory(config, tmp_path):
    path = _forged(tmp_path / "m.safetensors", **config)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ModelError):
        load_model(path)
    assert time.monotonic() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # KiB


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "[1, 2]", "{", '{"a": "' + "x" * (1 << 23) + '"}'])
def test_a_header_that_is_no_small_table_is_refused(text, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors", {"schema": SCHEMA, "meta": text})
    with pytest.raises(ModelError, match="PUMA did not write"):
        load_model(tmp_path / "m.safetensors")


def test_tied_weights_are_written_and_read(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(4, 4)
            self.two = torch.nn.Linear(4, 4)
            self.two.weight = self.one.weight

    tied, other = Tied(), Tied()
    save_model(tied, tmp_path / "m.safetensors")
    load_weights(other, load_tensors(tmp_path / "m.safetensors", SCHEMA)[0])
    assert weights_sha256(tied) == weights_sha256(other)
    assert other.two.weight is other.one.weight


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "c"])
def test_prefixes_of_wrappers_are_never_written_and_are_ignored_on_loading(model, wrap, tmp_path):
    wrapped = wrap(model)
    assert weights_sha256(wrapped) == weights_sha256(model)
    save_model(wrapped, tmp_path / "m.safetensors")
    assert weights_sha256(load_model(tmp_path / "m.safetensors")) == weights_sha256(model)
    other, third = (build_model(**{**model.config, "seed": seed}) for seed in (5, 6))
    load_weights(other, wrapped.state_dict())
    assert weights_sha256(other) == weights_sha256(model)
    load_weights(wrap(third), model.state_dict())
    assert weights_sha256(third) == weights_sha256(model)


@pytest.mark.parametrize(
    "prefix", ["module.model.", "model.module.", "net.", "_fsdp_wrapped_module.", "model._orig_mod."]
)
def test_prefixes_of_other_wrappers_are_ignored_on_loading(model, prefix):
    other = build_model(**{**model.config, "seed": 5})
    load_weights(other, {prefix + name: value for name, value in model.state_dict().items()})
    assert weights_sha256(other) == weights_sha256(model)


def test_another_head_is_left_as_it_is_only_where_asked():
    ten, seven = (build_model("small-cnn", classes, in_channels=1, image_size=8) for classes in (10, 7))
    head = seven.logits.weight.detach().clone()
    with pytest.raises(ModelError, match=r"shapes: logits.bias \(10,\) for \(7,\)"):
        load_weights(seven, ten.state_dict())
    load_weights(seven, ten.state_dict(), new_head=True)
    assert torch.equal(seven.logits.weight, head)
    assert torch.equal(seven.features[0].weight, ten.features[0].weight)


def test_others_may_read_a_weights_file_as_any_other(model, tmp_path):
    (tmp_path / "plain").write_text("")
    save_model(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
