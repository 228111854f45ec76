"""Training interrupted anywhere equals training that was not, bit for bit."""

from __future__ import annotations

import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from puma.data.load import load_dataset
from puma.data.source import Source
from puma.errors import CheckError, ModelError, ResumeError
from puma.generation import Diffusion, DiffusionConfig, SamplerConfig, diffusion, diffusion_config, generate
from puma.generation.diffusion import build_denoiser, learning_rate, train_diffusion
from puma.generation.edm import loss, sample_sigma
from puma.models.weights import weights_sha256

MLP = DiffusionConfig(width=16, blocks=1, steps=10, batch_size=8, warmup=3, dropout=0.2, label_dropout=0.3, warp=0.3)
UNET = MLP.model_copy(update={"network": "unet", "width": 8, "multipliers": (1, 2), "attention": (4,)})


@pytest.fixture(scope="module")
def real() -> Source:
    return load_dataset("digits:train")


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From now on, Ctrl-C in the middle of that step."""
    whole = diffusion.loss

    def interrupted(*args: object, **options: object) -> torch.Tensor:
        interrupted.calls += 1
        if interrupted.calls > step:
            raise KeyboardInterrupt
        return whole(*args, **options)

    interrupted.calls = 0
    monkeypatch.setattr(diffusion, "loss", interrupted)


@pytest.mark.parametrize("config", [MLP, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize("stop", [2, 7])
def test_resumed_equals_uninterrupted(
    real: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DiffusionConfig, stop: int
) -> None:
    whole = train_diffusion(real, tmp_path / "whole", config=config)
    with monkeypatch.context() as patch:
        _stop_at(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(real, tmp_path / "cut", config=config, checkpoint_every=3)
    assert bool(list((tmp_path / "cut").rglob("state-*.safetensors"))) == (stop >= 3)
    torch.manual_seed(stop)  # what the global generator did meanwhile must not matter
    again = train_diffusion(real, tmp_path / "cut", config=config, checkpoint_every=4)
    assert weights_sha256(again.denoiser) == weights_sha256(whole.denoiser)
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_global_generator_is_left_alone(real: Source, tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train_diffusion(real, tmp_path, config=MLP.model_copy(update={"steps": 2}))
    np.testing.assert_array_equal(torch.rand(3), wanted)


def test_finished_training_is_loaded_not_repeated(
    real: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_diffusion(real, tmp_path, config=MLP)
    _stop_at(monkeypatch, 0)
    again = train_diffusion(real, tmp_path, config=MLP)
    assert weights_sha256(again.denoiser) == weights_sha256(first.denoiser)


def test_other_settings_or_data_are_refused(real: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(real, tmp_path, config=MLP, checkpoint_every=2)
    with pytest.raises(ResumeError, match=r"config\.width: 16 there, 24 now"):
        train_diffusion(real, tmp_path, config=MLP.model_copy(update={"width": 24}))
    with pytest.raises(ResumeError, match="fingerprint"):
        train_diffusion(load_dataset("digits:test"), tmp_path, config=MLP)


def test_another_thread_count_is_named(
    real: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        _stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(real, tmp_path, config=MLP, checkpoint_every=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    train_diffusion(real, tmp_path, config=MLP)
    assert "threads: 1 there, 64 now" in caplog.text


ON_A_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
)


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_unet_for_32_pixels_trains_and_samples_in_bf16(tmp_path: Path, device: str) -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 3
    np.savez(tmp_path / "real.npz", image=images, label=labels)
    config = diffusion_config((32, 32, 3), width=16, blocks=1, steps=2, batch_size=4)
    assert config.precision == "bf16"
    assert config.compile  # on a GPU only
    sampler = SamplerConfig(steps=2, guidance=1.5)
    real = load_dataset(tmp_path / "real.npz")
    path = generate(real, 4, out=tmp_path / "made.npz", config=config, sampler=sampler, device=device)
    assert real.image_shape == np.load(path)["image"].shape[1:] == (32, 32, 3)


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_training_lowers_the_loss(real: Source, tmp_path: Path, network: str) -> None:
    config = DiffusionConfig(
        network=network, width=16, blocks=1, multipliers=(1, 2), steps=40, batch_size=16, warmup=5, shift=0
    )
    model = train_diffusion(real, tmp_path, config=config)
    generator = torch.Generator().manual_seed(0)
    images = torch.from_numpy(real.read(slice(0, 100))).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(images.shape, generator=generator)
    sigma = sample_sigma(100, config.noise_mean, config.noise_std, generator)
    labels = torch.from_numpy(real.labels[:100])
    untrained = build_denoiser(config, (8, 8, 1), 10)
    before, after = (loss(one, images, labels, sigma, noise).mean().item() for one in (untrained, model.denoiser))
    assert after < 0.85 * before


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_weights_are_refused(real: Source, tmp_path: Path, damage: str) -> None:
    train_diffusion(real, tmp_path, config=MLP.model_copy(update={"steps": 1}))
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    with pytest.raises(ModelError):
        Diffusion.load(tmp_path)


def test_a_damaged_checkpoint_is_passed_over(real: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_diffusion(real, tmp_path / "whole", config=MLP)
    with monkeypatch.context() as patch:
        _stop_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train_diffusion(real, tmp_path / "cut", config=MLP, checkpoint_every=3)
    newest = max((tmp_path / "cut").rglob("state-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-5])
    again = train_diffusion(real, tmp_path / "cut", config=MLP)
    assert weights_sha256(again.denoiser) == weights_sha256(whole.denoiser)


def test_diverged_training_stops_before_the_step(real: Source, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="diffusion loss is"):
        train_diffusion(real, tmp_path, config=MLP.model_copy(update={"learning_rate": 1e30, "warmup": 0}))
    assert not (tmp_path / "model.safetensors").exists()


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = DiffusionConfig(steps=1000, warmup=100, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(rates[99], abs=0.01)
    assert rates[550] == pytest.approx(0.5 * (1 + np.cos(np.pi * 0.55)))
    assert rates[1000] == pytest.approx(0, abs=1e-9)


def _generate(real: Source, out: Path) -> None:
    config = DiffusionConfig(width=32, blocks=1, steps=100, batch_size=32)
    sampler = SamplerConfig(steps=6, shard_rows=50, batch_size=25)
    generate(real, 500, out=out, config=config, sampler=sampler, checkpoint_every=20)


@pytest.mark.dist
def test_kill_9_then_the_same_call_gives_the_same_bytes(real: Source, tmp_path: Path) -> None:
    whole, cut, folder = tmp_path / "whole.npz", tmp_path / "cut.npz", tmp_path / "cut.diffusion"
    _generate(real, whole)
    for awaited in (
        "checkpoints/state-000000040.safetensors",
        "model.safetensors",
        "shards/000000000100-000000000150.npz",
    ):
        process = get_context("fork").Process(target=_generate, args=(real, cut))
        process.start()
        until = time.monotonic() + 60
        while not (folder / awaited).exists() and process.is_alive() and time.monotonic() < until:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"was not interrupted at {awaited}"
        assert not cut.exists()
    _generate(real, cut)
    assert cut.read_bytes() == whole.read_bytes()
    assert {path.name for path in folder.iterdir()} <= {"model.safetensors", "settings.json", "generated.json", ".lock"}
