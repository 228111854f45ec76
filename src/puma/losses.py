"""Losses, one number per image, in natural logarithms; lower is better for the network. Nothing here knows a data set.

Shapes: logits ``[B, K]``, labels int64 ``[B]``, results ``[B]``, float32 also for half-precision logits. ``attacked``
is bool ``[B]``: False where an image's eps is 0. Such an image is not perturbed, so its adversarial term is exactly
zero, also where batch statistics differ between the clean and the attacked batch. Values and gradients are finite for
logit gaps of 10^4 and more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy; the label keeps ``1 - smoothing + smoothing/K``, every other class gets ``smoothing/K``."""
    return F.cross_entropy(_wide(logits), labels, reduction="none", label_smoothing=smoothing)


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)), exactly 0 where the two are the same bits."""
    log_p = F.log_softmax(_wide(reference), dim=1)
    return (log_p.exp() * (log_p - F.log_softmax(_wide(logits), dim=1))).sum(1)


def carlini_wagner(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the label's: positive where the image is misclassified; higher is a stronger attack."""
    logits = _wide(logits)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return others - own


def trades(
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    *,
    weight: float,
    smoothing: float = 0.0,
    attacked: Tensor | None = None,
) -> Tensor:
    """TRADES (arXiv 1901.08573, eq. 5) as Wang et al. 2023 (arXiv 2302.04638) compute it.

    ``CE(clean, label) + weight * KL(softmax(clean) || softmax(adversarial))``, with ``weight`` beta (5 in the published
    runs) and label ``smoothing`` of the first term. The gradient flows through both arguments of KL.
    """
    robust = kl_divergence(adversarial, clean)
    return cross_entropy(clean, labels, smoothing) + weight * (robust if attacked is None else robust * attacked)


def mart(
    clean: Tensor, adversarial: Tensor, labels: Tensor, *, weight: float, attacked: Tensor | None = None
) -> Tensor:
    """MART (Wang et al., ICLR 2020, eq. 11).

    ``CE(adv, y) - log(1 - max over k != y of p_k(adv)) + weight * KL(clean || adv) * (1 - p_y(clean))``, with the small
    constants of the authors' code.
    """
    p_adv, log_clean = F.softmax(_wide(adversarial), 1), F.log_softmax(_wide(clean), 1)
    p_clean = log_clean.exp()
    other = p_adv.scatter(1, labels[:, None], 0.0).amax(1)
    boosted = cross_entropy(adversarial, labels) - torch.log(1.0001 - other + 1e-12)
    # log(p + 1e-12) as the authors do, which differs from a log-softmax only where p vanishes; but not their
    # xlogy(p, p) for the clean term, whose gradient is NaN there
    divergence = (p_clean * log_clean - p_clean * torch.log(p_adv + 1e-12)).sum(1)
    unsure = 1.0000001 - p_clean.gather(1, labels[:, None]).squeeze(1)
    return boosted + weight * (divergence * unsure if attacked is None else divergence * unsure * attacked)


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least: half precision rounds 1.0001 to 1, and a loss of 10^4 to the next 64."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
