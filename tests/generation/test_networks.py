"""Networks and augmentation: shapes, what the condition reaches, and images that are changed as told."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from puma.errors import UsageError
from puma.generation.diffusion import augment, build_denoiser
from puma.generation.networks import AUGMENT_DIM, DiffusionConfig, build_network, diffusion_config, validated
from puma.generation.sampling import SamplerConfig

SMALL = {"width": 16, "blocks": 1, "multipliers": (1, 2, 2), "attention": (8,)}


def _images(count: int = 6, channels: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("network", ["mlp", "unet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_untrained_denoiser_returns_skip_times_noisy(network: str, channels: int) -> None:
    denoiser = build_denoiser(DiffusionConfig(network=network, **SMALL), (16, 16, channels), 4)
    noisy = _images(channels=channels)
    found = denoiser(noisy, torch.full((6,), 0.5), torch.zeros(6, dtype=torch.long))
    np.testing.assert_allclose(found.detach(), 0.5 * noisy, atol=1e-6)


@pytest.mark.parametrize("network", ["mlp", "unet"])
def test_noise_label_and_augmentation_reach_the_output_and_every_weight_learns(network: str) -> None:
    torch.manual_seed(0)
    net = build_network(DiffusionConfig(network=network, **SMALL), (3, 16, 16), 4)
    for weight in net.parameters():  # zero-initialised ends would hide everything
        torch.nn.init.normal_(weight, std=0.3)
    images, noise, label = _images(), torch.zeros(6), torch.zeros(6, dtype=torch.long)
    plain = net(images, noise, label)
    assert plain.shape == images.shape
    assert (net(images, noise + 0.3, label) - plain).abs().max() > 1e-3
    assert (net(images, noise, label + 4) - plain).abs().max() > 1e-3
    assert (net(images, noise, label, torch.ones(6, AUGMENT_DIM)) - plain).abs().max() > 1e-3
    np.testing.assert_array_equal(net(images, noise, label, torch.zeros(6, AUGMENT_DIM)).detach(), plain.detach())
    net(images, noise, label, torch.ones(6, AUGMENT_DIM)).square().mean().backward()
    silent = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not silent


def test_unet_has_attention_where_asked_and_is_channels_last() -> None:
    net = build_network(DiffusionConfig(network="unet", **SMALL), (3, 16, 16), 4)
    attentions = [name for name, module in net.named_modules() if type(module).__name__ == "Attention"]
    # One block down and two up at 8 pixels, and the middle.
    assert len(attentions) == 4
    assert net.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_unet_for_32_pixels_has_its_stated_size() -> None:
    net = build_network(diffusion_config((32, 32, 3)), (3, 32, 32), 10)
    assert sum(weight.numel() for weight in net.parameters()) == pytest.approx(17.8e6, rel=0.01)


def test_the_unet_without_diffusers_says_how_to_install_it_and_the_mlp_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match="not installed") as error:
        build_network(DiffusionConfig(network="unet", **SMALL), (3, 16, 16), 4)
    assert "puma-robust[diffusers]" in error.value.fix
    build_network(DiffusionConfig(), (1, 8, 8), 10)


def test_sizes_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(UsageError, match="divisible by 4"):
        build_network(DiffusionConfig(network="unet", **SMALL), (1, 10, 10), 4)


def test_unknown_settings_are_named_all_at_once() -> None:
    with pytest.raises(UsageError, match=r"ema.*widht") as error:
        diffusion_config((8, 8, 1), widht=3, ema=2.0)
    assert "label_dropout" in error.value.fix
    assert diffusion_config((8, 8, 1), steps=5) == DiffusionConfig(steps=5)
    assert diffusion_config((32, 32, 3)).network == "unet"
    with pytest.raises(UsageError, match="no settings for images of 224x224"):
        diffusion_config((224, 224, 3))
    with pytest.raises(UsageError, match="guidance"):
        validated(SamplerConfig, {"guidance": -1})


def test_shift_moves_by_whole_pixels_as_told() -> None:
    images = _images(200, 1, 16)
    changed, applied = augment(images, torch.Generator().manual_seed(0), shift=0.5)
    moved = (applied[:, 1:3] * 2).round().long()  # at 16 pixels the reach is 2
    assert 0.3 < (moved != 0).any(1).float().mean() < 0.6
    np.testing.assert_allclose(applied[:, 1:3] * 2, moved)
    for image, result, (down, right) in zip(images, changed, moved.tolist(), strict=True):
        rows, columns = ((torch.arange(16) + by).clamp(0, 15) for by in (down, right))
        np.testing.assert_array_equal(result, image[:, rows][:, :, columns])


def test_flip_is_told_and_exact() -> None:
    images = _images(50)
    changed, applied = augment(images, torch.Generator().manual_seed(0), flip=0.5)
    assert 0 < applied[:, 0].sum() < 50
    np.testing.assert_array_equal(changed, torch.where(applied[:, 0, None, None, None] == 1, images.flip(3), images))
    assert not applied[:, 1:].any()


def test_warp_leaves_untold_images_alone_and_moves_as_told() -> None:
    images = torch.zeros(300, 1, 33, 33)
    images[:, :, 16, 16] = 1  # a point in the middle
    changed, applied = augment(images, torch.Generator().manual_seed(0), warp=0.3)
    alone = ~applied.any(1)
    assert 0.2 < alone.float().mean() < 0.5
    np.testing.assert_array_equal(changed[alone], images[alone])
    only_moved = applied[:, 3:5].any(1) & ~applied[:, 5:].any(1) & (applied[:, 3:5].abs().amax(1) < 0.3)
    assert only_moved.sum() > 10
    place = torch.arange(33.0)
    for result, (down, right) in zip(changed[only_moved, 0], applied[only_moved, 3:5].tolist(), strict=True):
        centre = [(result.sum(1 - axis) * place).sum() / result.sum() for axis in (0, 1)]
        np.testing.assert_allclose(centre, [16 + 33 * down, 16 + 33 * right], atol=0.01)


def test_nothing_asked_nothing_changed() -> None:
    images = _images()
    changed, applied = augment(images, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(changed, images)
    assert not applied.any()
