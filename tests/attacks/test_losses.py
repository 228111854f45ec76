"""Losses against plain sums over images and classes."""

from __future__ import annotations

import math

import pytest
import torch

from puma import losses


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    clean, adversarial = (torch.randn(9, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return clean.requires_grad_(), adversarial.requires_grad_(), torch.randint(0, 5, (9,), generator=generator)


def softmax(row):
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def slow_trades(clean, adversarial, label, weight, smoothing):
    p, q = softmax(clean), softmax(adversarial)
    k = len(p)
    target = [smoothing / k + (1 - smoothing) * (i == label) for i in range(k)]
    ce = -sum(t * math.log(value) for t, value in zip(target, p, strict=True))
    return ce + weight * sum(r * math.log(r / other) for r, other in zip(p, q, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trades(logits, smoothing):
    clean, adversarial, labels = logits
    fast = losses.trades(clean, adversarial, labels, weight=5.0, smoothing=smoothing)
    slow = [
        slow_trades(c, a, y, 5.0, smoothing)
        for c, a, y in zip(clean.tolist(), adversarial.tolist(), labels.tolist(), strict=True)
    ]
    assert torch.allclose(fast, torch.tensor(slow, dtype=torch.float64), atol=1e-12)


def test_trades_gradient_flows_through_the_clean_softmax(logits):
    clean, adversarial, labels = logits
    (gradient,) = torch.autograd.grad(losses.trades(clean, adversarial, labels, weight=5.0).sum(), clean)
    (plain,) = torch.autograd.grad(losses.cross_entropy(clean, labels).sum(), clean)
    # d KL(p || q) / d clean_j = p_j * (log p_j - log q_j - KL)
    log_p, log_q = clean.log_softmax(1), adversarial.log_softmax(1)
    kl = losses.kl_divergence(adversarial, clean)[:, None]
    assert torch.allclose(gradient - plain, 5 * log_p.exp() * (log_p - log_q - kl), atol=1e-10)


def test_equal_logits_have_no_divergence_at_all():
    logits = torch.randn(50, 10)
    assert torch.equal(losses.kl_divergence(logits, logits.clone()), torch.zeros(50))


def test_unattacked_images_have_no_adversarial_term(logits):
    clean, adversarial, labels = logits
    attacked = torch.arange(9) % 2 == 0
    loss = losses.trades(clean, adversarial, labels, weight=5.0, attacked=attacked)
    assert torch.equal(loss[~attacked], losses.cross_entropy(clean, labels)[~attacked])
    (gradient,) = torch.autograd.grad(loss.sum(), adversarial)
    assert torch.equal(gradient[~attacked], torch.zeros(4, 5, dtype=torch.float64))
    mart = losses.mart(clean, adversarial, labels, weight=5.0, attacked=attacked)
    unweighted = losses.mart(clean, adversarial, labels, weight=0.0)
    assert torch.equal(mart[~attacked], unweighted[~attacked])
    assert torch.all(mart[attacked] > unweighted[attacked])


def test_mart(logits):
    clean, adversarial, labels = logits
    slow = []
    for c, a, y in zip(clean.tolist(), adversarial.tolist(), labels.tolist(), strict=True):
        p, q = softmax(c), softmax(a)
        other = max(value for i, value in enumerate(q) if i != y)
        kl = sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
        slow.append(-math.log(q[y]) - math.log(1.0001 - other) + 4.0 * kl * (1.0000001 - p[y]))
    assert torch.allclose(
        losses.mart(clean, adversarial, labels, weight=4.0), torch.tensor(slow, dtype=torch.float64), atol=1e-8
    )


def test_cw_and_smoothed_labels(logits):
    clean, _, labels = logits
    for value, row, label in zip(losses.carlini_wagner(clean, labels).tolist(), clean.tolist(), labels, strict=True):
        assert value == max(v for i, v in enumerate(row) if i != label) - row[label]
    shares = torch.nn.functional.one_hot(labels, 5).double() * 0.7 + 0.3 / 5
    assert torch.allclose(losses.cross_entropy(clean, shares), -(shares * clean.log_softmax(1)).sum(1), atol=1e-12)
    assert torch.allclose(losses.cross_entropy(clean, shares), losses.cross_entropy(clean, labels, 0.3))


ALL = {
    "cross_entropy": lambda c, a, y: losses.cross_entropy(a, y),
    "smoothed": lambda c, a, y: losses.cross_entropy(a, y, 0.1),
    "kl": lambda c, a, y: losses.kl_divergence(a, c),
    "cw": lambda c, a, y: losses.carlini_wagner(a, y),
    "trades": lambda c, a, y: losses.trades(c, a, y, weight=6.0, smoothing=0.1),
    "mart": lambda c, a, y: losses.mart(c, a, y, weight=5.0),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [0, 20, 88, 104, 150, 1e3, 1e4])
@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_are_right_at_every_logit_gap(name, gap, kind):
    """Against the same loss in float64; the label's logit is ``gap`` above or below the others."""
    labels = torch.arange(5).repeat(4)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).repeat_interleave(5, 0)
    generator = torch.Generator().manual_seed(1)
    given = []
    for column in range(2):
        logits = torch.randn(20, 5, generator=generator)
        logits[range(20), labels] += signs[:, column] * gap
        given.append(logits.to(kind).requires_grad_())
    exact = [logits.detach().double().requires_grad_() for logits in given]
    value, right = ALL[name](*given, labels), ALL[name](*exact, labels)
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), right, rtol=1e-4, atol=1e-4)
    for slope, of in zip(
        torch.autograd.grad(value.sum(), given, allow_unused=True),
        torch.autograd.grad(right.sum(), exact, allow_unused=True),
        strict=True,
    ):
        assert (slope is None) == (of is None)
        if slope is not None:  # rounding: of the largest term, and of a gap that cancels
            rounding = 4e-3 if kind == torch.bfloat16 else 1e-4
            assert torch.allclose(
                slope.double(), of, rtol=rounding, atol=rounding * (1 + float(of.abs().max())) + 1e-6 * gap
            )
