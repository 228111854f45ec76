"""The diffusers backend. The stand-in pipelines have the calls of real ones; a tiny real one needs the library."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from puma.data.load import load_dataset
from puma.errors import CheckError, ModelError, UsageError
from puma.generation import SamplerConfig, generate_from
from puma.generation.sampling import load_pipeline, pipeline_sampler

INSTALLED = importlib.util.find_spec("diffusers") is not None


class Pipeline:
    """Draws, from each image's generator, noise around a brightness that says which condition it got."""

    def __init__(self, size: int = 8) -> None:
        self.size, self.calls = size, []
        self.components = {"unet": nn.Linear(1, 1), "scheduler": None}
        nn.init.ones_(self.components["unet"].weight)
        nn.init.zeros_(self.components["unet"].bias)
        self.scheduler = SimpleNamespace(config={"steps": 10})

    def _draw(self, brightness: list[float], generator: list[torch.Generator], output_type: str) -> SimpleNamespace:
        assert output_type == "np"
        assert len(brightness) == len(generator)
        self.calls.append(len(generator))
        noise = [torch.rand(self.size, self.size, 3, generator=one).numpy() for one in generator]
        return SimpleNamespace(images=np.stack([0.1 * n + b for n, b in zip(noise, brightness, strict=True)]))


class ByClass(Pipeline):
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
    ) -> SimpleNamespace:
        return self._draw([label / 10 for label in class_labels], generator or [], output_type)


class ByText(Pipeline):
    def __call__(
        self, prompt: list[str], generator: list[torch.Generator] | None = None, output_type: str = "pil"
    ) -> SimpleNamespace:
        return self._draw([len(text) / 100 for text in prompt], generator or [], output_type)


class Unconditional(Pipeline):
    def __call__(self, batch_size: int = 1, output_type: str = "pil") -> SimpleNamespace:
        return self._draw([0.0], [torch.Generator()], output_type)


@pytest.fixture(autouse=True)
def diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name, where the library itself is not installed."""
    if not INSTALLED:
        module = ModuleType("diffusers")
        module.__version__ = "0"
        monkeypatch.setitem(sys.modules, "diffusers", module)


def _brightness(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return images.reshape(len(images), -1).min(1) / 255


def test_labels_reach_the_pipeline_as_its_own_class_ids(tmp_path: Path) -> None:
    sampler = pipeline_sampler(ByClass(), ["cat", "dog"], class_ids=[3, 7])
    made = load_dataset(generate_from(sampler, 10, out=tmp_path / "a.npz"))
    np.testing.assert_array_equal(made.labels, np.arange(10) % 2)
    wanted = np.where(made.labels == 0, 0.3, 0.7)
    np.testing.assert_allclose(_brightness(made.read(slice(None))), wanted, atol=0.02)


def test_labels_reach_the_pipeline_as_prompts() -> None:
    sampler = pipeline_sampler(ByText(), ["a", "bbbbbbbbbb"], prompt="{name}" + "!" * 10)
    found = sampler.sample(np.arange(4), np.array([0, 1, 1, 0]))
    np.testing.assert_allclose(_brightness(found), [0.11, 0.2, 0.2, 0.11], atol=0.02)


def test_image_k_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    def made(batch_size: int) -> NDArray[np.uint8]:
        sampler = pipeline_sampler(ByClass(), ["cat", "dog"], seed=4)
        out = tmp_path / f"{batch_size}.npz"
        path = generate_from(sampler, 9, out=out, config=SamplerConfig(batch_size=batch_size, shard_rows=5))
        return load_dataset(path).read(slice(None))

    np.testing.assert_array_equal(made(2), made(5))


def test_images_are_shrunk() -> None:
    sampler = pipeline_sampler(ByClass(size=32), ["cat"], size=8)
    assert sampler.image_shape == (8, 8, 3)


def test_identity_tells_weights_options_and_seed_apart() -> None:
    plain = pipeline_sampler(ByClass(), ["cat"]).identity
    assert plain == pipeline_sampler(ByClass(), ["cat"]).identity
    other = ByClass()
    nn.init.constant_(other.components["unet"].weight, 2.0)
    assert pipeline_sampler(other, ["cat"]).identity["weights"] != plain["weights"]
    assert pipeline_sampler(ByClass(), ["cat"], options={"num_inference_steps": 7}).identity != plain
    assert pipeline_sampler(ByClass(), ["cat"], seed=1).identity != plain


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        (Unconditional, {}, "samples without labels"),
        (ByClass, {"options": {"steps": 3}}, "takes no option steps"),
        (ByClass, {"class_ids": [1, 2, 3]}, "3 class ids for 2 class names"),
        (ByText, {"prompt": "a cat"}, "same for every class"),
    ],
)
def test_what_does_not_fit_is_refused_before_sampling(
    pipeline: type[Pipeline], options: dict[str, Any], message: str
) -> None:
    built = pipeline()
    with pytest.raises(UsageError, match=message):
        pipeline_sampler(built, ["cat", "dog"], **options)
    assert not built.calls


def test_nan_images_are_refused() -> None:
    with pytest.raises(CheckError, match="returned NaN"):
        pipeline_sampler(ByClass(), ["cat"], class_ids=[float("nan")])


def test_missing_diffusers_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match="not installed") as error:
        load_pipeline("somewhere")
    assert "puma-robust[diffusers]" in error.value.fix


def test_torchvision_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "diffusers", Broken("diffusers"))
    with pytest.raises(UsageError, match="torchvision"):
        load_pipeline("somewhere")


@pytest.mark.skipif(not INSTALLED, reason="diffusers is not installed")
def test_a_real_pipeline_from_a_folder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    pipeline = DiTPipeline(
        DiTTransformer2DModel(2, 8, 4, out_channels=8, num_layers=1, sample_size=8, patch_size=2,
                              num_embeds_ada_norm=1000, norm_num_groups=4),
        AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, **blocks),
        DDIMScheduler(),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "pipeline", safe_serialization=True)

    def made(batch_size: int) -> NDArray[np.uint8]:
        loaded = load_pipeline(str(tmp_path / "pipeline"))
        sampler = pipeline_sampler(loaded, ["cat", "dog"], options={"num_inference_steps": 2})
        out = tmp_path / f"{batch_size}.npz"
        path = generate_from(sampler, 6, out=out, config=SamplerConfig(batch_size=batch_size))
        return load_dataset(path).read(slice(None))

    first = made(3)
    assert first.shape == (6, 8, 8, 3)
    assert np.abs(first[0].astype(int) - first[2]).max() > 5
    assert np.abs(made(2).astype(int) - first).max() <= 1
    with pytest.raises(ModelError, match="cannot open"):
        load_pipeline(str(tmp_path / "nowhere"))
