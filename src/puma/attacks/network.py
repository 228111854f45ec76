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

from puma.errors import ModelError

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From classes ``up`` and ``down`` ``[b, m]`` to ``f_up - f_down`` ``[b, m]`` and its gradients ``[b, m, D]``."""

_MODE_DEPENDENT = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.RReLU,
)


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
        (gradient,) = torch.autograd.grad(logits, x, direction, retain_graph=keep, allow_unused=True)
        return torch.zeros_like(x) if gradient is None else gradient

    def _forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        images = (x if self.proxy is None else self._padded(x)).view(-1, *self.shape)
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.model(images) if self.proxy is None else self.proxy(images)[: len(x)]
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"the model returns {got} for {len(x)} images",
                why=f"a margin needs logits of shape [{len(x)}, classes]",
            )
        return logits.float()

    def _padded(self, x: Tensor) -> Tensor:
        """Fill up to the next of four sizes, so that a batch that shrinks does not make a compiler start again."""
        sizes = sorted({max(1, self.chunk >> halvings) for halvings in range(4)})
        missing = next(size for size in sizes if size >= len(x)) - len(x)
        return torch.cat([x, x[-1:].expand(missing, -1)]) if missing else x

    def _chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk):
            yield slice(start, min(start + self.chunk, rows))


def require_eval(model: nn.Module) -> None:
    """Refuse a model whose answer would depend on the batch, or on chance.

    Raises:
        ModelError: BatchNorm, dropout or the like is in training mode.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, _MODE_DEPENDENT):
            raise ModelError(
                f"the model is in training mode ({type(module).__name__} at {name or 'its root'!r})",
                why="its logits would depend on the other images of the batch, or on chance",
                fix="call model.eval() first",
            )
