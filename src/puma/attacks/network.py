"""A model as DeepFool uses it: logits without a graph, and gradients of logit differences to the input.

One forward pass with a graph serves all candidate classes (one backward pass each); gradients go to the input only, so
nothing is ever written into the weights' ``.grad``. Images travel in chunks that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from puma.errors import DataError
from puma.models.checks import ONE_LOGIT, as_logits, check_first, model_errors, require_eval

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From classes ``up`` and ``down`` ``[b, m]`` to ``f_up - f_down`` ``[b, m]`` and its gradients ``[b, m, D]``."""


ROUNDING = 1e-6


class Network:
    """A frozen view of ``model`` on images of shape ``[B, *shape]``, given flattened as ``[B, D]``.

    Args:
        model: maps float images in [0, 1] to logits ``[B, K]``; in eval mode.
        shape: shape of one image.
        chunk: images per pass.
        bf16: compute gradients under bfloat16 autocast.
        proxy: what the search evaluates in ``model``'s place; see `puma.deepfool`.

    Raises:
        ModelError: a layer whose output depends on the mode (BatchNorm, dropout, ...) is in training mode.
    """

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], chunk: int, bf16: bool = False, proxy: nn.Module | None = None
    ) -> None:
        require_eval(model)
        self.model, self.shape, self.chunk, self.bf16, self.proxy = model, shape, chunk, bf16, proxy
        self.forwards = self.backwards = 0
        """Images passed so far, forwards and backwards: what a result cost."""

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, K]`` of ``x`` ``[B, D]`` in float32, without a graph."""
        with torch.no_grad():
            return torch.cat([self._forward(x[rows]) for rows in self._chunks(len(x))])

    def exact(self, x: Tensor, known: Tensor | None = None) -> Tensor:
        """As `logits`, by the model itself; ``known`` where the search's own logits are just that."""
        if known is not None and self.proxy is None and not self.bf16:
            return known
        proxy, self.proxy = self.proxy, None
        try:
            return self.logits(x)
        finally:
            self.proxy = proxy

    def passes(self, points: Tensor) -> Iterator[tuple[slice, Tensor, Gradients]]:
        """Yield, chunk by chunk: the slice of the rows, logits ``[b, K]``, and how to get gradients (once)."""
        for rows in self._chunks(len(points)):
            x = points[rows].detach().requires_grad_(True)
            with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self._forward(x)
            value = logits.detach()

            def gradients(
                up: Tensor, down: Tensor, x: Tensor = x, logits: Tensor = logits, value: Tensor = value
            ) -> tuple[Tensor, Tensor]:
                last = up.shape[1] - 1
                each = [self._gradient(logits, x, up[:, j], down[:, j], j < last) for j in range(last + 1)]
                return value.gather(1, up) - value.gather(1, down), torch.stack(each, dim=1)

            yield rows, value, gradients

    def check(self, x: Tensor) -> Tensor:
        """Return the logits ``[2, K]`` of the first of ``x`` and its negative; see `puma.models.checks.check_first`."""
        self.forwards += 2
        return check_first(self.model, x[:1].view(-1, *self.shape)).float()

    def compiling(self) -> AbstractContextManager[None]:
        """Let a compiled proxy keep what a second backward pass through the same graph will need."""
        if self.proxy is None:
            return nullcontext()
        patched: AbstractContextManager[None] = functorch_config.patch(donated_buffer=False)
        return patched

    def _gradient(self, logits: Tensor, x: Tensor, up: Tensor, down: Tensor, keep: bool) -> Tensor:
        """Return the gradient ``[b, D]`` of ``f_up - f_down``."""
        direction = torch.zeros_like(logits)
        direction.scatter_(1, up.unsqueeze(1), 1.0)
        direction.scatter_add_(1, down.unsqueeze(1), torch.full_like(direction[:, :1], -1.0))
        self.backwards += len(x)
        if not logits.requires_grad:  # the output does not depend on the input at all
            return torch.zeros_like(x)
        with model_errors(x):
            (gradient,) = torch.autograd.grad(logits, x, direction, retain_graph=keep, allow_unused=True)
        return torch.zeros_like(x) if gradient is None else gradient

    def _forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        images = (x if self.proxy is None else self._padded(x)).view(-1, *self.shape)
        layout = torch.channels_last if images.ndim == 4 else torch.contiguous_format
        with model_errors(images):  # a copy: some models write into their input
            output = (self.model if self.proxy is None else self.proxy)(images.clone(memory_format=layout))
        return as_logits(output, len(images))[: len(x)].float()

    def _padded(self, x: Tensor) -> Tensor:
        """Fill up to the next of four sizes, so that a batch that shrinks does not make a compiler start again."""
        sizes = sorted({max(1, self.chunk >> halvings) for halvings in range(4)})
        missing = next(size for size in sizes if size >= len(x)) - len(x)
        return torch.cat([x, x[-1:].expand(missing, -1)]) if missing else x

    def _chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk):
            yield slice(start, min(start + self.chunk, rows))


def as_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return images as float32 in [0, 1] and labels as int64 beside them; numpy arrays are taken too.

    Values up to 1e-6 outside [0, 1] are rounding and moved there.

    Raises:
        DataError: wrong type, shape or range.
    """
    try:
        images, labels = (torch.as_tensor(value).detach() for value in (images, labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError("images or labels are no array of numbers", why=str(error).splitlines()[0][:200]) from None
    if not images.is_floating_point() or images.ndim < 2 or images.layout is not torch.strided:
        raise DataError(
            f"images are {images.dtype} {list(images.shape)}, {images.layout}",
            why="a dense float [B, ...] in [0, 1] is needed, a batch of images",
            fix="images.float() / 255 for pixels of 0 to 255, images[None] for a single image",
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images", why="int [B] is needed"
        )
    images, labels = images.float(), labels.to(images.device).long()
    if images.numel():
        low, high = float(images.min()), float(images.max())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise DataError(
                f"images reach from {low:g} to {high:g}",
                why="pixels have to be in [0, 1]",
                fix="divide by 255" if low >= 0 and high > 2 else "undo the normalisation: the model normalises inside",
            )
        if low < 0 or high > 1:
            images = images.clamp(0, 1)
    # tensors made in inference mode cannot take part in autograd
    return images.clone() if images.is_inference() else images, labels.clone() if labels.is_inference() else labels


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that the model has no class for.

    Raises:
        DataError: a label below 0 or beyond the last class.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels reach from {low} to {high}",
            why=f"the model has {classes} classes",
            fix=ONE_LOGIT if classes == 1 else "labels are 0 to classes - 1",
        )
