"""EDM against closed forms: the formulas of Karras et al. 2022 and Gaussian data with its exact denoiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from puma.generation import edm

POSITIVE = st.floats(1e-3, 1e3)


@given(sigma=POSITIVE, data=st.floats(0.1, 2))
def test_preconditioning_is_table_1(sigma: float, data: float) -> None:
    found = edm.coefficients(torch.tensor([sigma], dtype=torch.float64), data)
    assert found.c_skip.item() == pytest.approx(data**2 / (sigma**2 + data**2))
    assert found.c_out.item() == pytest.approx(sigma * data / math.sqrt(sigma**2 + data**2))
    assert found.c_in.item() == pytest.approx(1 / math.sqrt(sigma**2 + data**2))
    assert found.c_noise.item() == pytest.approx(math.log(sigma) / 4)


@given(sigma=POSITIVE, data=st.floats(0.1, 2))
def test_weight_times_c_out_squared_is_one(sigma: float, data: float) -> None:
    level = torch.tensor([sigma], dtype=torch.float64)
    assert (edm.loss_weight(level, data) * edm.coefficients(level, data).c_out ** 2).item() == pytest.approx(1)


class Zero(nn.Module):
    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        return torch.zeros_like(image)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_untrained_loss_is_one_at_every_noise_level(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images = 0.5 * torch.randn(4000, 1, 4, 4, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    found = edm.loss(edm.Denoiser(Zero(), 0.5), images, torch.zeros(4000).long(), torch.full((4000,), sigma), noise)
    assert found.shape == (4000,)
    assert found.mean().item() == pytest.approx(1.0, abs=0.02)


def test_training_noise_is_log_normal() -> None:
    sigma = edm.sample_sigma(100_000, -1.2, 1.2, torch.Generator().manual_seed(0)).log()
    assert sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert sigma.std().item() == pytest.approx(1.2, abs=0.02)


def test_schedule_is_equation_5() -> None:
    found = edm.schedule(18)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    wanted = [(high + i / 17 * (low - high)) ** 7 for i in range(18)] + [0.0]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


class Gaussian:
    """Data N(mean, covariance) on flattened images, with its exact denoiser E[x | x + sigma n]."""

    def __init__(self, size: int = 4) -> None:
        random = np.random.default_rng(0)
        root = random.normal(size=(size, size)) * 0.4
        self.covariance = torch.from_numpy(root @ root.T)
        self.mean = torch.from_numpy(random.normal(size=size) * 0.3)

    def denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        flat = noisy.flatten(1).double()
        out = torch.empty_like(flat)
        for level in sigma.unique():
            rows = sigma == level
            gain = self.covariance @ torch.linalg.inv(self.covariance + level**2 * torch.eye(len(self.mean)).double())
            out[rows] = self.mean + (flat[rows] - self.mean) @ gain.T
        return out.view_as(noisy)

    def endpoint(self, noise: Tensor, sigma_max: float) -> Tensor:
        """Exact solution of the probability-flow ODE at sigma 0, from sigma_max * noise.

        In the covariance's eigenbasis d x / d sigma = sigma x / (eigenvalue + sigma^2), so that
        x(0) = x(sigma_max) * sqrt(eigenvalue / (eigenvalue + sigma_max^2)).
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        state = (noise.flatten(1).double() * sigma_max - self.mean) @ vectors
        shrunk = state * (values.clamp(min=0) / (values + sigma_max**2)).sqrt()
        return (shrunk @ vectors.T + self.mean).view_as(noise)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(20_000, 1, 2, 2, generator=torch.Generator().manual_seed(1))


def test_heun_gives_exact_covariance_of_gaussian_data(noise: Tensor) -> None:
    data = Gaussian()
    # Whitened noise takes the sampling error away: what is left is the solver's.
    flat = noise[:2000].flatten(1).double()
    flat = flat - flat.mean(0)
    white = flat @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(flat.T))).T
    found = edm.sample(data.denoise, white.view(-1, 1, 2, 2), edm.schedule(256)).flatten(1)
    # Starting at 80 * noise instead of mean + 80 * noise leaves 1 % of the mean out, which the closed form tells too.
    wanted = data.endpoint(torch.zeros(1, 1, 2, 2), 80.0)[0].flatten()
    np.testing.assert_allclose(found.mean(0), wanted, atol=1e-3)
    np.testing.assert_allclose(torch.cov(found.T), data.covariance, atol=1e-3)


def test_default_18_steps_are_near_the_exact_endpoint(noise: Tensor) -> None:
    data = Gaussian()
    found = edm.sample(data.denoise, noise[:500], edm.schedule(18))
    error = found - data.endpoint(noise[:500], 80.0)
    assert error.square().mean().sqrt() < 0.05  # the data's own standard deviation is about 0.7


def test_heun_converges_at_second_order(noise: Tensor) -> None:
    data = Gaussian()
    start, sigmas = noise[:200], {steps: edm.schedule(steps, sigma_min=0.5, sigma_max=8.0)[:-1] for steps in (65, 129)}
    exact = data.endpoint(start, 8.0)
    # Compared at sigma 0.5: the last step to 0 is always Euler's, in the paper too.
    values, vectors = torch.linalg.eigh(data.covariance)
    grow = ((values + 0.25) / values).sqrt()
    wanted = ((exact.flatten(1) - data.mean) @ vectors * grow) @ vectors.T + data.mean
    error = {
        steps: (edm.sample(data.denoise, start, levels).flatten(1) - wanted).abs().max().item()
        for steps, levels in sigmas.items()
    }
    assert error[65] / error[129] == pytest.approx(4, rel=0.1)


class Labelled(nn.Module):
    """F returns its label everywhere, so that guidance can be read off."""

    def forward(self, image: Tensor, noise: Tensor, label: Tensor, augment: Tensor | None = None) -> Tensor:
        return label[:, None, None, None].float().expand_as(image)


def test_guidance_extrapolates_from_no_label() -> None:
    denoiser, labels = edm.Denoiser(Labelled(), 0.5), torch.tensor([1, 2])
    noisy, sigma = torch.zeros(2, 1, 2, 2), torch.ones(2)
    out = edm.coefficients(sigma, 0.5).c_out
    for guidance in (0.0, 1.0, 2.5):
        found = edm.guided(denoiser, labels, 10, guidance)(noisy, sigma)[:, 0, 0, 0]
        np.testing.assert_allclose(found, out * (10 + guidance * (labels - 10)), rtol=1e-5)
