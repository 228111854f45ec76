"""Images of a trained model: the same whatever the batch, the order, the part or the interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from puma.data.load import load_dataset
from puma.data.npz import read_comment, write_npz
from puma.errors import DataError, ModelError, ResumeError
from puma.generation import Diffusion, DiffusionConfig, SamplerConfig, generate_from
from puma.generation.diffusion import train_diffusion
from puma.generation.sampling import Sampler, diffusion_sampler, to_pixels
from puma.io import sha256_file
from puma.models.weights import save_tensors, weights_sha256

MLP = DiffusionConfig(width=32, blocks=2, steps=60, batch_size=32, warmup=5, label_dropout=0.2)
UNET = DiffusionConfig(network="unet", width=8, blocks=1, multipliers=(1, 2), steps=8, batch_size=8, warmup=2)


@pytest.fixture(scope="module", params=[MLP, UNET], ids=["mlp", "unet"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return train_diffusion(load_dataset("digits:train"), tmp_path_factory.mktemp("model"), config=request.param)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return train_diffusion(load_dataset("digits:train"), tmp_path_factory.mktemp("model"), config=MLP)


def _sample(
    model: Diffusion, indices: NDArray[np.int64], labels: NDArray[np.int64], seed: int = 0, **settings: float
) -> NDArray[np.int64]:
    return diffusion_sampler(model, seed, SamplerConfig(**settings)).sample(indices, labels).astype(np.int64)


def test_image_k_does_not_depend_on_the_batch(model: Diffusion) -> None:
    indices = np.arange(15)
    labels = indices % 10
    whole = _sample(model, indices, labels, steps=5)
    assert whole.std() > 10
    for size in (1, 4):
        parts = [_sample(model, indices[i : i + size], labels[i : i + size], steps=5) for i in range(0, 15, size)]
        assert np.abs(np.concatenate(parts) - whole).max() <= 1  # rounding to the next grey level
    order = np.random.default_rng(0).permutation(15)
    assert np.abs(_sample(model, order, labels[order], steps=5) - whole[order]).max() <= 1


def test_images_label_and_seed_matter(model: Diffusion) -> None:
    indices, labels = np.arange(8), np.zeros(8, np.int64)
    first = _sample(model, indices, labels, steps=5)
    assert np.abs(first - first[:1])[1:].max() > 5
    assert np.abs(first - _sample(model, indices, labels, seed=1, steps=5)).max() > 5


def test_guidance_and_label_change_images(mlp: Diffusion) -> None:
    indices, labels = np.arange(8), np.arange(8)
    plain = _sample(mlp, indices, labels)
    np.testing.assert_array_equal(plain, _sample(mlp, indices, labels, guidance=1.0))
    assert np.abs(plain - _sample(mlp, indices, labels, guidance=3.0)).max() > 1
    assert np.abs(plain - _sample(mlp, indices, labels + 1)).max() > 1


def test_whatever_was_interrupted_or_damaged_the_file_has_the_same_bytes(mlp: Diffusion, tmp_path: Path) -> None:
    config = SamplerConfig(steps=3, batch_size=7, shard_rows=16)
    sampler, calls = diffusion_sampler(mlp, 0, config), 0
    whole = generate_from(sampler, 50, out=tmp_path / "whole.npz", config=config).read_bytes()

    def stopping(indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the fourth shard
            raise KeyboardInterrupt
        return sampler.sample(indices, labels)

    out, interrupted = tmp_path / "cut.npz", replace(sampler, sample=stopping)
    with pytest.raises(KeyboardInterrupt):
        generate_from(interrupted, 50, out=out, config=config)
    shards = sorted((tmp_path / "cut.diffusion" / "shards").glob("*.npz"))
    assert len(shards) == 3
    shards[0].write_bytes(shards[0].read_bytes()[:-40])  # truncated
    flipped = bytearray(shards[1].read_bytes())
    flipped[300] ^= 1
    shards[1].write_bytes(flipped)
    assert generate_from(interrupted, 50, out=out, config=config).read_bytes() == whole
    assert calls == 10 + 3 + 3 + 1  # the third shard was kept


def test_shards_of_other_settings_are_refused(mlp: Diffusion, tmp_path: Path) -> None:
    def stopping(indices: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        raise KeyboardInterrupt

    def interrupted(seed: int) -> Sampler:
        return replace(diffusion_sampler(mlp, seed), sample=stopping)

    with pytest.raises(KeyboardInterrupt):
        generate_from(interrupted(0), 8, out=tmp_path / "a.npz")
    with pytest.raises(ResumeError, match="seed: 0 there, 1 now"):
        generate_from(interrupted(1), 8, out=tmp_path / "a.npz")


def test_generate_from_a_saved_model(mlp: Diffusion, tmp_path: Path) -> None:
    mlp.save(tmp_path / "saved")
    sampler = SamplerConfig(steps=3)
    one = generate_from(mlp, 20, out=tmp_path / "one.npz", config=sampler)
    two = generate_from(Diffusion.load(tmp_path / "saved"), 20, out=tmp_path / "two.npz", config=sampler)
    assert one.read_bytes() == two.read_bytes()
    assert read_comment(one)["generator"]["weights"] == weights_sha256(mlp.denoiser)
    with pytest.raises(ResumeError, match="seed: 0 there, 3 now"):
        generate_from(mlp, 20, out=one, config=sampler, seed=3)


def test_the_checksum_lies_beside_the_file_and_damage_is_found(mlp: Diffusion, tmp_path: Path) -> None:
    config = SamplerConfig(steps=2)
    path = generate_from(mlp, 20, out=tmp_path / "a.npz", config=config)
    digest, name = (tmp_path / "a.npz.sha256").read_text().split()
    assert (digest, name) == (sha256_file(path), "a.npz")
    assert json.loads((tmp_path / "a.diffusion" / "generated.json").read_text()) == read_comment(path)
    stamp = path.stat().st_mtime_ns
    (tmp_path / "a.npz.sha256").unlink()  # as if killed before it was written
    assert generate_from(mlp, 20, out=path, config=config).stat().st_mtime_ns == stamp
    assert (tmp_path / "a.npz.sha256").read_text().split()[0] == digest
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        generate_from(mlp, 20, out=path, config=config)


def test_bf16_on_a_cpu_without_its_instructions_is_named(mlp: Diffusion, tmp_path: Path, monkeypatch, caplog) -> None:
    model = replace(mlp, config=mlp.config.model_copy(update={"precision": "bf16"}))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for has_bf16 in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda has_bf16=has_bf16: has_bf16)
        generate_from(model, 10, out=tmp_path / f"{has_bf16}.npz", config=SamplerConfig(steps=2))
        assert ("no bfloat16 instructions" in caplog.text) != has_bf16


def test_a_file_of_somebody_else_is_not_overwritten(mlp: Diffusion, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"precious")
    with pytest.raises(ResumeError, match="is not ours"):
        generate_from(mlp, 20, out=tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == b"precious"


def test_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_tensors({}, tmp_path / "model.safetensors", "somebody/1", {})
    with pytest.raises(ModelError):
        Diffusion.load(tmp_path)


def test_writer_refuses_a_wrong_number_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 images but 4 labels"):
        write_npz(tmp_path / "a.npz", [np.zeros((3, 2, 2, 1), np.uint8)], np.zeros(4, np.int64))
    assert not list(tmp_path.iterdir())


def test_pixels_round_and_clip() -> None:
    np.testing.assert_array_equal(to_pixels(np.linspace(-1, 1, 256)), np.arange(256))
