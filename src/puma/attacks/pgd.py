"""Projected gradient ascent (arXiv 1706.06083) with an eps for every image.

eps_i enters the start, the step and the projection. An image with eps 0 comes back with the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from puma.attacks.network import as_batch, check_labels
from puma.errors import ModelError, UsageError, first_line, integer, number, unknown
from puma.losses import carlini_wagner, cross_entropy, kl_divergence
from puma.models.checks import IT_CHANGES, apply_model, attack_mode, check_first, check_same, model_errors
from puma.threat import Norm, ThreatModel

Loss = Literal["ce", "cw", "kl"]
Start = Literal["uniform", "gaussian", "none"]
_LOG = logging.getLogger("puma")
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "cw": carlini_wagner, "kl": kl_divergence}


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel | str,
    eps: float | Tensor | None = None,
    steps: int = 10,
    step_size: float | None = None,
    loss: Loss = "ce",
    start: Start = "uniform",
    generator: torch.Generator | None = None,
    warn: Callable[[str], None] = _LOG.warning,
) -> Tensor:
    """Perturb ``images`` so that the loss rises: float32 ``[B, ...]``, within eps_i of each image and inside [0, 1].

    Args:
        model: maps float32 images ``[B, ...]`` in [0, 1] to logits ``[B, K]``. It is called in the mode it is in
            (BatchNorm may be in training mode, but nothing random may), and stays as it is.
        images, labels: float ``[B, ...]`` in [0, 1], computed with in float32; int ``[B]``.
        threat: norm, and the eps that ``step_size`` belongs to.
        eps: in pixel units: None for the threat model's, one number, or float ``[B]``.
        steps, step_size: gradient steps, and their size in pixel units (default ``2.5 * threat.eps / steps``), of which
            an image takes the share ``eps_i / threat.eps``.
        loss: ``"ce"``; ``"cw"`` (largest other logit minus the label's); ``"kl"`` (from the clean prediction, TRADES).
        start: as `start_noise`; ``"none"`` is the image.
        generator: for the start, on the images' device. None draws from a new one with seed 0.
        warn: called with a text if the loss of some images has no gradient at all: the attack cannot move them.

    Raises:
        DataError: images or labels of the wrong type, shape or range.
        UsageError: unknown loss or start; negative steps or step size; eps negative, not finite or not ``[B]``.
        ModelError: as `puma.models.checks.check_first`; an answer that changes from call to call.
    """
    for kind, name, known in (("loss", loss, LOSSES), ("start", start, get_args(Start))):
        if not isinstance(name, str) or name not in known:
            raise unknown(kind, name, known)
    threat, steps = ThreatModel.parse(threat), integer("steps", steps, low=0)
    step = 2.5 * threat.eps / max(steps, 1) if step_size is None else number("step_size", step_size)
    with torch.inference_mode(False), torch.no_grad(), attack_mode(model):
        images, labels = as_batch(images, labels)
        each_eps = _image_eps(images, eps, threat)
        if not len(images):
            return images
        first = check_first(model, images)
        check_labels(labels, first.shape[1])
        check_same(first, check_first(model, images), IT_CHANGES)
        target = apply_model(model, images.clone()) if loss == "kl" else labels
        noise = start_noise(images.shape, start, threat, generator, images.device)

        def check_gradient(gradient: Tensor) -> None:
            largest = gradient.flatten(1).abs().amax(1)
            if not bool(largest.isfinite().all()):
                raise ModelError("the gradient of the model's loss is NaN", why="its logits or weights are not finite")
            if zeros := int(((largest == 0) & (each_eps > 0)).sum()):
                warn(f"zero gradient: the loss of {zeros} of {len(images)} attacked images has no gradient at all")

        return ascend(
            lambda x: LOSSES[loss](apply_model(model, x.clone()), target),  # a copy: some models write into it
            *(images, each_eps, noise, threat),
            steps=steps,
            step_size=step,
            on_first_gradient=check_gradient,
        )


@torch.no_grad()
def ascend(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    eps: Tensor,
    noise: Tensor | None,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    on_first_gradient: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The loop of `pgd`, unchecked: no synchronisation with the host, no branch on data.

    ``objective`` maps images to a loss each; ``noise`` is of `start_noise`, in units of each image's ``eps`` ``[B]``;
    ``on_first_gradient`` is called with the gradient at the start.
    """
    eps = _per_image(eps.to(images.dtype), images)
    lower, upper = (images - eps).clamp_(min=0), (images + eps).clamp_(max=1)

    def project_(x: Tensor) -> Tensor:
        """``x`` overwritten by what is allowed (in L2 by the box first, then by the ball)."""
        if threat.norm == "Linf":
            return torch.clamp(x, lower, upper, out=x)
        delta = x.clamp_(0, 1).sub_(images)
        length = _per_image(delta.flatten(1).norm(dim=1), delta)
        return delta.mul_(torch.where(length > eps, eps / length, 1.0)).add_(images)

    step = step_size * eps / threat.eps if threat.eps else 0.0
    adversarial = images.clone() if noise is None else project_(images + noise.to(images.dtype) * eps)
    for done in range(steps):
        at = adversarial.detach().requires_grad_(True)
        with torch.enable_grad(), model_errors(at):
            loss = objective(at).sum()
            gradient = torch.autograd.grad(loss, at)[0] if loss.requires_grad else torch.zeros_like(at)
        if done == 0 and on_first_gradient:
            on_first_gradient(gradient)
        adversarial = project_(_direction(gradient, threat.norm).mul_(step).add_(adversarial))
    return adversarial


def start_noise(
    shape: torch.Size | tuple[int, ...],
    start: str,
    threat: ThreatModel,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Return where to start, in units of each image's eps: float32 ``[B, C, H, W]``, or None for the image itself.

    ``uniform``: over the Linf box or L2 ball; ``gaussian``: 0.001 * N(0, 1) pixels at ``threat.eps``, else less.
    """
    if start == "none" or threat.eps == 0:
        return None
    if generator is None:
        generator = torch.Generator(device).manual_seed(0)
    if start == "gaussian":
        return torch.randn(shape, generator=generator, device=device) * (0.001 / threat.eps)
    if threat.norm == "Linf":
        return torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1)
    direction = _direction(torch.randn(shape, generator=generator, device=device), "L2")
    length: Tensor = torch.rand((shape[0], *[1] * (len(shape) - 1)), generator=generator, device=device)
    return direction * length ** (1 / math.prod(shape[1:]))


def _image_eps(images: Tensor, eps: float | Tensor | None, threat: ThreatModel) -> Tensor:
    if eps is not None and not isinstance(eps, (Tensor, np.ndarray, list, tuple)):
        eps = number("eps", eps)
    try:
        values = torch.as_tensor(threat.eps if eps is None else eps, dtype=images.dtype, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError("eps is no number and no array of numbers", why=first_line(error)) from None
    values = values.expand(len(images)) if values.ndim == 0 else values
    if values.shape != (len(images),):
        raise UsageError(f"eps has shape {tuple(values.shape)} for {len(images)} images", fix="one number, or one each")
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise UsageError("eps has values that are negative or not finite", why="it is a distance in pixel units")
    ThreatModel(threat.norm, max(values.tolist(), default=0.0))  # refuses 8 for 8/255
    return values


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    if norm == "Linf":
        return gradient.sign()
    # scaled by the largest entry first: the squares of a saturated image's gradient would underflow
    largest = _per_image(gradient.abs().flatten(1).amax(1), gradient)
    scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
    return scaled / _per_image(scaled.flatten(1).norm(dim=1).clamp_min(1e-12), scaled)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *([1] * (images.ndim - 1)))
