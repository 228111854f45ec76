"""Images of a trained model: the same whatever the batch, the order, the part or the interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from puma.data.edmfile import write_edm
from puma.data.load import load_dataset
from puma.errors import ModelError, ResumeError, UsageError
from puma.generation import Diffusion, DiffusionConfig, SamplerConfig, generate, generate_from
from puma.generation.drawing import condition_labels, draw_parts
from puma.generation.output import read_comment
from puma.generation.sampling import DiffusionDrawer, sample_images, to_pixels
from puma.generation.training import train_diffusion

MLP = DiffusionConfig(width=32, blocks=2, steps=60, batch_size=32, warmup=5, label_dropout=0.2)
UNET = DiffusionConfig(network="unet", width=8, blocks=1, multipliers=(1, 2), steps=8, batch_size=8, warmup=2)


@pytest.fixture(scope="module", params=[MLP, UNET], ids=["mlp", "unet"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return train_diffusion(load_dataset("digits:train"), tmp_path_factory.mktemp("model"), config=request.param)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    return train_diffusion(load_dataset("digits:train"), tmp_path_factory.mktemp("model"), config=MLP)


@pytest.mark.parametrize("sampler", [SamplerConfig(steps=5), SamplerConfig(steps=5, churn=3.0)], ids=["heun", "churn"])
def test_image_k_does_not_depend_on_the_batch(model: Diffusion, sampler: SamplerConfig) -> None:
    indices = np.arange(15)
    labels = condition_labels(indices, 10)
    whole = sample_images(model, indices, labels, sampler=sampler)
    assert whole.std() > 0.1
    for size in (1, 4):
        parts = [
            sample_images(model, indices[i : i + size], labels[i : i + size], sampler=sampler)
            for i in range(0, 15, size)
        ]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-3)
    order = np.random.default_rng(0).permutation(15)
    np.testing.assert_allclose(sample_images(model, order, labels[order], sampler=sampler), whole[order], atol=1e-3)


def test_images_label_and_seed_matter(model: Diffusion) -> None:
    indices, labels, quick = np.arange(8), np.zeros(8, np.int64), SamplerConfig(steps=5)
    first = sample_images(model, indices, labels, sampler=quick)
    assert np.abs(first - first[:1])[1:].max() > 0.05
    assert np.abs(first - sample_images(model, indices, labels + 1, sampler=quick)).max() > 1e-4
    assert np.abs(first - sample_images(model, indices, labels, seed=1, sampler=quick)).max() > 0.05


def test_guidance_changes_images_only_when_asked(mlp: Diffusion) -> None:
    indices, labels = np.arange(8), np.arange(8)
    plain = sample_images(mlp, indices, labels)
    np.testing.assert_array_equal(plain, sample_images(mlp, indices, labels, sampler=SamplerConfig(guidance=1.0)))
    assert np.abs(plain - sample_images(mlp, indices, labels, sampler=SamplerConfig(guidance=3.0))).max() > 0.01


def test_parts_have_the_same_bytes_whatever_was_interrupted(mlp: Diffusion, tmp_path: Path) -> None:
    drawer = DiffusionDrawer(mlp, 0, SamplerConfig(steps=3))
    options = {"batch_size": 7, "part_rows": 16}
    wanted = [path.read_bytes() for path in draw_parts(drawer, 50, tmp_path / "whole", **options)]
    assert len(wanted) == 4
    paths = draw_parts(drawer, 50, tmp_path / "cut", **options)
    paths[0].unlink()
    paths[1].write_bytes(wanted[1][:-40])  # truncated
    flipped = bytearray(wanted[2])
    flipped[300] ^= 1
    paths[2].write_bytes(flipped)
    stamp = paths[3].stat().st_mtime_ns
    assert [path.read_bytes() for path in draw_parts(drawer, 50, tmp_path / "cut", **options)] == wanted
    assert paths[3].stat().st_mtime_ns == stamp


def test_parts_of_other_settings_are_made_again(mlp: Diffusion, tmp_path: Path) -> None:
    options = {"batch_size": 8, "part_rows": 8}
    (path,) = draw_parts(DiffusionDrawer(mlp, 0, SamplerConfig(steps=3)), 8, tmp_path, **options)
    first = path.read_bytes()
    draw_parts(DiffusionDrawer(mlp, 1, SamplerConfig(steps=3)), 8, tmp_path, **options)
    assert path.read_bytes() != first


def test_labels_with_shares_follow_them_and_never_change() -> None:
    shares = np.array([0.5, 0.3, 0.2])
    labels = condition_labels(np.arange(4000), 3, shares=shares)
    np.testing.assert_allclose(np.bincount(labels) / 4000, shares, atol=0.03)
    np.testing.assert_array_equal(condition_labels(np.arange(100, 200), 3, shares=shares), labels[100:200])


def test_labels_as_real_through_generate(tmp_path: Path) -> None:
    real = load_dataset("digits:train")
    sampler = SamplerConfig(steps=2, labels="real", part_rows=64)
    path = generate(real, 150, out=tmp_path / "a.npz", config=MLP.model_copy(update={"steps": 2}), sampler=sampler)
    assert not np.array_equal(load_dataset(path).labels, np.arange(150) % 10)


def test_generate_from_a_saved_model(mlp: Diffusion, tmp_path: Path) -> None:
    mlp.save(tmp_path / "saved")
    sampler = SamplerConfig(steps=3)
    one = generate_from(mlp, 20, out=tmp_path / "one.npz", sampler=sampler)
    two = generate_from(Diffusion.load(tmp_path / "saved"), 20, out=tmp_path / "two.npz", sampler=sampler)
    assert one.read_bytes() == two.read_bytes()
    assert read_comment(one)["drawer"]["weights"] == mlp.weights_sha256()
    with pytest.raises(ResumeError, match="seed is 0, not 3"):
        generate_from(mlp, 20, out=one, sampler=sampler, seed=3)
    with pytest.raises(UsageError, match="needs the real images"):
        generate_from(mlp, 20, out=tmp_path / "c.npz", sampler=SamplerConfig(labels="real"))


def test_parquet_holds_the_same_images_in_hugging_face_layout(mlp: Diffusion, tmp_path: Path) -> None:
    sampler = SamplerConfig(steps=3, part_rows=8)
    plain = load_dataset(generate_from(mlp, 20, out=tmp_path / "a.npz", sampler=sampler))
    path = generate_from(mlp, 20, out=tmp_path / "b.parquet", sampler=sampler)
    found = load_dataset(path)
    np.testing.assert_array_equal(found.read(slice(None)), plain.read(slice(None)))
    np.testing.assert_array_equal(found.labels, plain.labels)
    features = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == [str(digit) for digit in range(10)]
    assert read_comment(path)["count"] == 20
    stamp = path.stat().st_mtime_ns
    assert generate_from(mlp, 20, out=path, sampler=sampler).stat().st_mtime_ns == stamp


def test_a_file_of_somebody_else_is_not_overwritten(mlp: Diffusion, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"precious")
    with pytest.raises(ResumeError, match="is not ours"):
        generate_from(mlp, 20, out=tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == b"precious"


def test_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"schema": "somebody/1"}')
    with pytest.raises(ModelError):
        Diffusion.load(tmp_path)


def test_writer_refuses_a_wrong_number_of_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 images but 4 labels"):
        write_edm(tmp_path / "a.npz", [np.zeros((3, 2, 2, 1), np.uint8)], np.zeros(4, np.int64))
    assert not list(tmp_path.iterdir())


def test_pixels_round_and_clip() -> None:
    np.testing.assert_array_equal(to_pixels(np.linspace(-1, 1, 256)), np.arange(256))
