"""`generate` end to end on the bundled digits, with a training far too short to be any good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from puma.data.load import load_dataset
from puma.data.source import Source
from puma.errors import DataError, ResumeError, UsageError
from puma.generation import Diffusion, DiffusionConfig, SamplerConfig, generate

TINY = DiffusionConfig(width=16, blocks=1, steps=12, batch_size=16)
QUICK = SamplerConfig(steps=3, shard_rows=16, batch_size=8)


@pytest.fixture(scope="module")
def real() -> Source:
    return load_dataset("digits:train")


def test_output_is_edm_layout_with_balanced_labels(real: Source, tmp_path: Path) -> None:
    path = generate(real, 50, out=tmp_path / "made.npz", config=TINY, sampler=QUICK)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays.files == ["image", "label"]
        assert arrays["image"].dtype == np.uint8
        assert arrays["image"].shape == (50, 8, 8, 1)
        assert arrays["label"].dtype == np.int64
        np.testing.assert_array_equal(np.bincount(arrays["label"]), 5)
    again = load_dataset(path)
    assert len(again) == 50
    assert Diffusion.load(tmp_path / "made.diffusion").image_shape == (8, 8, 1)
    assert not (tmp_path / "made.diffusion" / "shards").exists()


def test_same_seed_same_bytes_other_seed_other_images(real: Source, tmp_path: Path) -> None:
    first, again, other = (
        generate(real, 10, out=tmp_path / f"{name}.npz", config=TINY, sampler=QUICK, seed=seed).read_bytes()
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again
    assert first != other


def test_second_call_does_nothing_and_other_settings_are_refused(real: Source, tmp_path: Path) -> None:
    out = tmp_path / "made.npz"
    generate(real, 10, out=out, config=TINY, sampler=QUICK)
    stamp = out.stat().st_mtime_ns
    generate(real, 10, out=out, config=TINY, sampler=QUICK)
    assert out.stat().st_mtime_ns == stamp
    with pytest.raises(ResumeError, match=r"config\.steps: 12 there, 13 now"):
        generate(real, 10, out=out, config=TINY.model_copy(update={"steps": 13}), sampler=QUICK)
    with pytest.raises(ResumeError, match="seed: 0 there, 1 now"):
        generate(real, 10, out=out, config=TINY, sampler=QUICK, seed=1)
    with pytest.raises(ResumeError, match="holds 10 images, more than the 9"):
        generate(real, 9, out=out, config=TINY, sampler=QUICK)


def test_more_images_go_on_from_the_same_model(real: Source, tmp_path: Path) -> None:
    out = tmp_path / "made.npz"
    few = np.load(generate(real, 10, out=out, config=TINY, sampler=QUICK))["image"]
    weights = (tmp_path / "made.diffusion" / "model.safetensors").stat().st_mtime_ns
    many = np.load(generate(real, 20, out=out, config=TINY, sampler=QUICK))["image"]
    assert (tmp_path / "made.diffusion" / "model.safetensors").stat().st_mtime_ns == weights
    assert np.abs(many[:10].astype(int) - few).max() <= 1


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [(0, "a.npz", "count is 0"), (5, "a.zip", "written as .npz")],
)
def test_bad_requests_are_refused(real: Source, tmp_path: Path, count: int, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(real, count, out=tmp_path / name, config=TINY)
    assert not list(tmp_path.iterdir())


def test_guidance_needs_label_dropout(real: Source, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="guidance"):
        generate(real, 5, out=tmp_path / "a.npz", config=TINY, sampler=SamplerConfig(guidance=2.0))


def test_an_empty_class_is_refused(real: Source, tmp_path: Path) -> None:
    class Gap:
        name, labels = "gap", np.where(real.labels == 1, 0, real.labels)
        num_classes, image_shape, class_names = real.num_classes, real.image_shape, real.class_names

    with pytest.raises(DataError, match="no image of class 1"):
        generate(Gap(), 5, out=tmp_path / "a.npz", config=TINY)
