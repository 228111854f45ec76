"""Checks of a model, the same for scoring, training, evaluation and attacks: each rule once, worded once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb, format_list

import torch
from torch import Tensor, nn

from puma.errors import ModelError, PumaError

ONE_LOGIT = "a binary classifier with one logit: puma.TwoLogits(model)"
IT_CHANGES = "its answer changes from call to call"
IT_DEPENDS = "its answer depends on the other images of the batch"
_TOLERANCE = 1e-3  # of the largest logit: float32 passes of one image in two batches differ by less
_MODE_DEPENDENT = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.RReLU,
)


class TwoLogits(nn.Module):
    """A binary classifier with one logit, as one with two: ``[0, f]``, so that class 1 is predicted where ``f > 0``.

    Args:
        model: maps images to logits ``[B, 1]`` or ``[B]`` (before the sigmoid).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 2]``."""
        logit: Tensor = self.model(images).view(len(images), 1)
        return torch.cat([torch.zeros_like(logit), logit], 1)


@contextmanager
def model_errors(images: Tensor) -> Iterator[None]:
    """Context that turns any exception of a user's model into a ModelError, with the places in the user's own code."""
    try:
        yield
    except (PumaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = str(error).strip().splitlines()
        raise ModelError(
            f"the model fails on images of shape {list(images.shape)}, {str(images.dtype).removeprefix('torch.')}, "
            f"on {images.device.type}",
            why=(f"{type(error).__name__}: {said[0]}" if said else type(error).__name__) + _places(error),
            fix="model(images) by itself has to return logits [B, classes]",
        ) from error


def _places(error: BaseException) -> str:
    """The traceback below an exception, without the frames of PUMA and of torch."""
    libraries = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    return "".join(f"\n  {line}" for frame in format_list(frames[-4:]) for line in frame.splitlines())


def apply_model(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits ``[B, K]`` of a user's model.

    Raises:
        ModelError: the model raises an exception, or returns something else.
    """
    with model_errors(images):
        output = model(images)
    return as_logits(output, len(images))


def as_logits(output: object, count: int) -> Tensor:
    """Return the logits ``[count, K]`` in a model's output; those of Hugging Face's output objects are unwrapped.

    Raises:
        ModelError: a tuple, a dict without ``logits``, another shape.
    """
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    plain = isinstance(logits, Tensor) and logits.layout is torch.strided and not logits.is_complex()
    if isinstance(logits, Tensor) and plain and logits.ndim == 2 and len(logits) == count:
        return logits
    got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if isinstance(logits, Tensor) and not plain:
        got += f" ({logits.dtype}, {logits.layout})"
    single = isinstance(logits, Tensor) and logits.shape == (count,)
    raise ModelError(
        f"the model returns {got} for {count} images",
        why=f"logits of shape [{count}, classes] are needed",
        fix=ONE_LOGIT if single else "wrap it so that forward returns its logits",
    )


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


def check_same(one: Tensor, two: Tensor, why: str) -> None:
    """Refuse two answers ``[b, K]`` to the same images that differ by more than rounding.

    Raises:
        ModelError: they differ; ``why`` is the reason.
    """
    difference = (one.detach().float() - two.detach().float()).abs()
    if bool((difference > _TOLERANCE * (1 + one.detach().float().abs().amax())).any()):
        raise ModelError(
            f"the model gives different logits for the same image (by {float(difference.nan_to_num().max()):.3g})",
            why=why,
            fix="call model.eval() first; batch statistics, dropout and noise have to be off",
        )


def check_logits(logits: Tensor) -> None:
    """Refuse probabilities in the place of logits ``[B, K]``.

    Raises:
        ModelError: all rows are positive and sum to 1 (and they are not all the same).
    """
    rows = logits.detach().float()
    distributions = (rows >= 0).all() & ((rows.sum(1) - 1).abs() < 1e-3).all()
    if len(rows) and bool(distributions & (rows != rows[:1]).any()):
        raise ModelError(
            "the model returns probabilities, not logits",
            why="every row is positive and sums to 1; margins and gradients of probabilities vanish where it is sure",
            fix="remove the softmax at the model's end",
        )


def check_first(model: nn.Module, images: Tensor) -> Tensor:
    """Check a model on the first image and its negative, in one forward pass; return their logits ``[2, K]``.

    Raises:
        ModelError: an exception; no logits, or probabilities; logits without a gradient to the images.
    """
    pair = torch.cat([images[:1], 1 - images[:1]]).requires_grad_()
    with torch.enable_grad():
        logits = apply_model(model, pair.clone())
    check_logits(logits)
    if not logits.requires_grad and bool((logits[0] != logits[1]).any()):
        raise ModelError(
            "the model's logits carry no gradient to the images",
            why="its forward runs under torch.no_grad or inference_mode, or detaches, or rounds through numpy",
            fix="attacks need torch.autograd from the images to the logits",
        )
    return logits.detach()


def check_model(model: nn.Module, images: Tensor, num_classes: int = 2, *, reacts: bool = True) -> Tensor:
    """Check a model on a few images before hours are spent on it.

    Args:
        model: maps float images in [0, 1] to logits; in eval mode.
        images: float ``[B, ...]`` in [0, 1], on the model's device; some tens.
        num_classes: of the data.
        reacts: refuse a model whose logits are the same for every image (a fresh network may have a head of zeros).

    Returns:
        The logits ``[B, K]``.

    Raises:
        ModelError: training mode; an exception; no logits, or probabilities; too few classes; an answer that depends on
            the other images, changes from call to call, or does not depend on the image.
    """
    require_eval(model)
    with torch.no_grad():
        logits = apply_model(model, images.clone())
        if logits.shape[1] < num_classes:
            raise ModelError(
                f"the model has {logits.shape[1]} classes, the data {num_classes}",
                why="model and data do not belong together",
                fix=ONE_LOGIT if logits.shape[1] == 1 else "use a model trained on these classes",
            )
        check_same(logits, apply_model(model, images.clone()), IT_CHANGES)
        alone = [apply_model(model, images[row : row + 1].clone()) for row in range(min(4, len(images)))]
        check_same(logits[: len(alone)], torch.cat(alone), IT_DEPENDS)
        check_logits(logits)
        if reacts and torch.equal(logits, apply_model(model, 1 - images)) and bool((logits == logits[:1]).all()):
            raise ModelError(
                "the model does not react to its input",
                why="its logits are the same for every image",
                fix="look at its weights, and at what its forward does with the images",
            )
    return logits
