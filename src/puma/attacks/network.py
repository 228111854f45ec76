"""A model as DeepFool uses it: logits without a graph, and gradients of logit differences to the input.

One forward pass with a graph serves all candidate classes (one backward pass each); gradients go to the input only, so
nothing is ever written into the weights' ``.grad``. Images travel in chunks that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from puma.errors import DataError, first_line
from puma.models.checks import ONE_LOGIT, as_logits, batchnorm_layers, check_first, model_errors, require_eval
from puma.models.weights import unwrap

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From classes ``up`` and ``down`` ``[b, m]`` to ``f_up - f_down`` ``[b, m]`` and its gradients ``[b, m, D]``."""
ROUNDING = 1e-6
_FOLDING = 1e-5  # of the largest logit: a folded model that differs by more is not used


class Network:
    """A frozen view of ``model`` on images of ``shape``, given flattened as ``[B, D]``; counts the images passed."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], chunk: int, bf16: bool = False, proxy: nn.Module | None = None
    ) -> None:
        require_eval(model)
        self.model, self.shape, self.chunk, self.bf16, self.proxy = model, shape, chunk, bf16, proxy
        self.searcher = model if proxy is None else proxy  # what answers unless the exact logits are asked for
        self.forwards = self.backwards = 0

    def logits(self, x: Tensor, exact: bool = False) -> Tensor:
        """Return the logits ``[B, K]`` of ``x`` ``[B, D]`` in float32, without a graph; ``exact``: the model's own."""
        with torch.no_grad():
            return torch.cat([self._forward(x[rows], exact) for rows in self._chunks(len(x))])

    def passes(self, points: Tensor) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Yield, chunk by chunk: the slice of the rows, logits ``[b, K]``, and how to get gradients (once)."""
        for rows in self._chunks(len(points)):
            x = points[rows].detach().requires_grad_(True)
            with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self._forward(x)
            yield rows, logits.detach(), partial(self._gradients, x, logits)

    def check(self, x: Tensor) -> Tensor:
        """Return the logits ``[2, K]`` of `check_first`; from a chunk of images on, fold the model for the search."""
        self.forwards += 2
        logits = check_first(self.model, x[:1].view(-1, *self.shape)).float()
        if self.proxy is None and len(x) >= self.chunk and batchnorm_layers(self.model):
            first = x[: self.chunk]
            self.searcher = fold_batchnorm(self.model, first.view(-1, *self.shape), self.logits(first))
            self.forwards += len(first)
        return logits

    def _gradients(self, x: Tensor, logits: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        gradients = []
        for left, rise, fall in zip(range(up.shape[1] - 1, -1, -1), up.T, down.T, strict=True):
            direction = torch.zeros_like(logits).scatter_(1, rise.unsqueeze(1), 1.0)
            direction.scatter_add_(1, fall.unsqueeze(1), torch.full_like(direction[:, :1], -1.0))
            self.backwards += len(x)
            gradient = None
            if logits.requires_grad:  # else the output does not depend on the input at all
                with model_errors(x):
                    (gradient,) = torch.autograd.grad(logits, x, direction, retain_graph=left > 0, allow_unused=True)
            gradients.append(torch.zeros_like(x) if gradient is None else gradient)
        value = logits.detach()
        return value.gather(1, up) - value.gather(1, down), torch.stack(gradients, dim=1)

    def _forward(self, x: Tensor, exact: bool = False) -> Tensor:
        self.forwards += len(x)
        model = self.model if exact else self.searcher
        images = (self._padded(x) if model is self.proxy else x).view(-1, *self.shape)
        layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
        with model_errors(images):  # a copy: some models write into their input
            output = model(images.clone(memory_format=layout))
        return as_logits(output, len(images))[: len(x)].float()

    def _padded(self, x: Tensor) -> Tensor:
        """Fill up to the next of four sizes, so that a batch that shrinks does not make a compiler start again."""
        sizes = sorted({max(1, self.chunk >> halvings) for halvings in range(4)})
        missing = next(size for size in sizes if size >= len(x)) - len(x)
        return torch.cat([x, x[-1:].expand(missing, -1)]) if missing else x

    def _chunks(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.chunk, rows)) for start in range(0, rows, self.chunk))


def fold_batchnorm(model: nn.Module, images: Tensor, logits: Tensor) -> nn.Module:
    """Return a faster copy of ``model`` (eval mode): batch normalisation becomes part of the convolution before it.

    The model itself where it is compiled, and where the copy's answer to ``images`` ``[B, C, H, W]`` is not ``logits``
    ``[B, K]`` up to rounding: something else uses what a convolution returns, or images take different ways.
    """
    if unwrap(model) is not model:  # the hooks would make torch compile the copy, twice
        return model
    outputs: list[tuple[nn.Conv2d, Tensor]] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def convolved(layer: nn.Conv2d, _: object, output: Tensor) -> None:
        outputs.append((layer, output))

    def normalising(layer: nn.BatchNorm2d, given: tuple[Tensor]) -> None:
        pairs.extend((convolution, layer) for convolution, output in outputs if output is given[0])

    try:
        copy = deepcopy(model)
        names = {layer: name for name, layer in copy.named_modules()}
        hooks = [one.register_forward_hook(convolved) for one in names if isinstance(one, nn.Conv2d)]
        hooks += [one.register_forward_pre_hook(normalising) for one in names if type(one) is nn.BatchNorm2d]
        copy(images[:1].clone())
        for hook in hooks:
            hook.remove()
        for convolution, layer in pairs:
            copy.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, layer))
            copy.set_submodule(names[layer], nn.Identity())
        copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it for tensors only
        difference = (as_logits(copy(images.clone()), len(images)).float() - logits).abs().amax()
    except Exception:  # a user's module may raise anything when it is copied
        return model
    return copy if pairs and difference <= _FOLDING * (1 + logits.abs().amax()) else model


def as_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return images as float32 in [0, 1] (1e-6 outside is moved there) and labels as int64; or raise DataError."""
    try:
        images, labels = (torch.as_tensor(_native(value)).detach() for value in (images, labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError("images or labels are no array of numbers", why=first_line(error)) from None
    if any(value.is_nested or value.is_meta for value in (images, labels)):
        raise DataError("images or labels are no array of numbers", why="they are nested, or without values (meta)")
    if not images.is_floating_point() or images.ndim < 2 or images.layout is not torch.strided:
        what = f"images are {images.dtype} {list(images.shape)}, {images.layout}"
        why = "a dense float [B, ...] in [0, 1] is needed, a batch of images"
        fix = "images.float() / 255 for pixels of 0 to 255, images[None] for a single image"
        raise DataError(what, why=why, fix=fix)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        what = f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images"
        raise DataError(what, why="int [B] is needed")
    images, labels = images.float(), labels.to(images.device).long()
    if images.numel():
        low, high = float(images.min()), float(images.max())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            fix = "divide by 255" if low >= 0 and high > 2 else "undo the normalisation: the model normalises inside"
            raise DataError(f"images reach from {low:g} to {high:g}", why="pixels have to be in [0, 1]", fix=fix)
        if low < 0 or high > 1:
            images = images.clamp(0, 1)
    # tensors made in inference mode cannot take part in autograd
    return images.clone() if images.is_inference() else images, labels.clone() if labels.is_inference() else labels


def _native(value: Any) -> Any:
    """Arrays of the other byte order, or with negative strides, as torch takes them."""
    return np.array(value, value.dtype.newbyteorder("="), order="C") if isinstance(value, np.ndarray) else value


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels below 0 or beyond the model's last class with a DataError."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        fix = ONE_LOGIT if classes == 1 else "labels are 0 to classes - 1"
        raise DataError(f"labels reach from {low} to {high}", why=f"the model has {classes} classes", fix=fix)
