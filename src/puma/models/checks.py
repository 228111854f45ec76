"""Checks of a model, the same for scoring, training, evaluation and attacks, and the modes in which they call it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb, format_list

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from puma.errors import ModelError, PumaError

logger = logging.getLogger("puma")

ONE_LOGIT = "a binary classifier with one logit: puma.TwoLogits(model)"
IT_CHANGES = "its answer changes from call to call"
IT_DEPENDS = "its answer depends on the other images of the batch"
_TOLERANCE = 1e-3  # of the largest logit: float32 passes of one image in two batches differ by less
_MODE_DEPENDENT = (_BatchNorm, nn.modules.dropout._DropoutNd, nn.modules.instancenorm._InstanceNorm, nn.RReLU)


class TwoLogits(nn.Module):
    """A binary classifier with one logit ``f`` (``[B, 1]`` or ``[B]``, no sigmoid) as one with two: ``[0, f]``."""

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
        said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        libraries = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)
        frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
        places = "".join(f"\n  {line}" for frame in format_list(frames[-4:]) for line in frame.splitlines())
        kind = f"shape {list(images.shape)}, {str(images.dtype).removeprefix('torch.')}, on {images.device.type}"
        fix = "model(images) by itself has to return logits [B, classes]; made for another size: SOURCE?resize=224"
        raise ModelError(f"the model fails on images of {kind}", why=f"{said}{places}", fix=fix) from error


def apply_model(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits ``[B, K]`` of a user's model; `ModelError` where it fails or returns something else."""
    with model_errors(images):
        output = model(images)
    return as_logits(output, len(images))


def as_logits(output: object, count: int) -> Tensor:
    """Return the logits ``[count, K]`` in a model's output (Hugging Face's are unwrapped), or raise `ModelError`."""
    inner = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    logits = output if isinstance(output, Tensor) else inner
    shaped = isinstance(output, Tensor) and not output.is_nested
    got = f"shape {list(getattr(output, 'shape', ()))}" if shaped else f"a {type(output).__name__}"
    fix = "wrap it so that forward returns its logits"
    if isinstance(logits, Tensor) and not logits.is_nested:
        if logits.layout is not torch.strided or not logits.is_floating_point() or logits.is_meta:
            got += f" ({logits.dtype}, {logits.layout}, on {logits.device})"
        elif logits.ndim == 2 and len(logits) == count:
            return logits
        fix = ONE_LOGIT if logits.shape == (count,) else fix
    why = f"logits of shape [{count}, classes] are needed"
    raise ModelError(f"the model returns {got} for {count} images", why=why, fix=fix)


def require_module(model: object) -> None:
    """Refuse (`ModelError`) a function, a name or a file in a network's place."""
    if not isinstance(model, nn.Module):
        what, why = f"the model is a {type(model).__name__}", "parameters and buffers are needed: a torch.nn.Module"
        raise ModelError(what, why=why, fix="a file: puma.load_model(path); a function: call it in a Module's forward")


def require_eval(model: nn.Module) -> None:
    """Refuse (`ModelError`) a model with BatchNorm, dropout or the like in training mode."""
    require_module(model)
    for name, module in model.named_modules():
        if module.training and isinstance(module, _MODE_DEPENDENT):
            what = f"the model is in training mode ({type(module).__name__} at {name or 'its root'!r})"
            why = "its logits would depend on the other images of the batch, or on chance"
            raise ModelError(what, why=why, fix="call model.eval() first")


def check_same(one: Tensor, two: Tensor, why: str) -> None:
    """Refuse (`ModelError`, cause ``why``) two answers ``[b, K]`` to the same images that differ beyond rounding."""
    first = one.detach().float()
    difference = (first - two.detach().float()).abs()
    if bool((difference > _TOLERANCE * (1 + first.abs().amax())).any()):
        what = f"the model gives different logits for the same image (by {float(difference.nan_to_num().max()):.3g})"
        fix = "call model.eval() first; batch statistics, dropout and noise have to be off"
        raise ModelError(what, why=why, fix=fix)


def check_logits(logits: Tensor) -> None:
    """Refuse (`ModelError`) probabilities as logits ``[B, K]``: rows positive, of sum 1, not all equal."""
    rows, tolerance = logits.detach().float(), 2e-2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-3
    distributions = (rows >= 0).all() & ((rows.sum(1) - 1).abs() < tolerance).all()
    if len(rows) and bool(distributions & (rows != rows[:1]).any()):
        why = "every row is positive and sums to 1; margins and gradients of probabilities vanish where it is sure"
        raise ModelError("the model returns probabilities, not logits", why=why, fix="remove the softmax at its end")


def check_first(model: nn.Module, images: Tensor) -> Tensor:
    """Check a model on the first image and its negative in one pass; return their logits ``[2, K]``.

    `ModelError`: an exception; no logits, or probabilities; logits without a gradient to the images.
    """
    pair = torch.cat([images[:1], 1 - images[:1]]).requires_grad_()
    with torch.enable_grad():
        logits = apply_model(model, pair.clone())
    check_logits(logits)
    if not logits.requires_grad and bool((logits[0] != logits[1]).any()):
        why = "its forward runs under torch.no_grad or inference_mode, or detaches, or rounds through numpy"
        fix = "attacks need torch.autograd from the images to the logits"
        raise ModelError("the model's logits carry no gradient to the images", why=why, fix=fix)
    return logits.detach()


def recorded_logits(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """The logits of the first of ``images``, finite: what `puma.io.claim_folder` knows a model's code by."""
    with torch.no_grad():
        return {"logits": apply_model(model, images.clone())[0].float().nan_to_num().tolist()}


def check_model(model: nn.Module, images: Tensor, num_classes: int = 2, *, reacts: bool = True) -> Tensor:
    """Check a model on some tens of images ``[B, ...]`` before hours are spent on it; return their logits ``[B, K]``.

    `ModelError`: training mode; an exception; no logits, or probabilities; fewer than ``num_classes``; an answer that
    depends on the other images, changes from call to call, or (with ``reacts``) does not depend on the image.
    """
    require_eval(model)
    if isinstance(size := getattr(model, "image_size", None), int) and size != images.shape[-1]:
        text = "the model was made for images of %d pixels, these have %d: ?resize=%d"
        logger.warning(text, size, images.shape[-1], size)
    with torch.no_grad():
        logits = apply_model(model, images.clone())
        if logits.shape[1] < num_classes:
            what = f"the model has {logits.shape[1]} classes, the data {num_classes}"
            fix = ONE_LOGIT if logits.shape[1] == 1 else "use a model trained on these classes (to train: --new-head)"
            raise ModelError(what, why="model and data do not belong together", fix=fix)
        if logits.shape[1] > num_classes and not getattr(model, "class_names", None):
            text = "the model has %d classes, the data %d: labels are taken by number (to train: --new-head)"
            logger.warning(text, logits.shape[1], num_classes)
        check_same(logits, apply_model(model, images.clone()), IT_CHANGES)
        alone = [apply_model(model, images[row : row + 1].clone()) for row in range(min(4, len(images)))]
        check_same(logits[: len(alone)], torch.cat(alone), IT_DEPENDS)
        check_logits(logits)
        if reacts and torch.equal(logits, apply_model(model, 1 - images)) and bool((logits == logits[:1]).all()):
            why, fix = "its logits are the same for every image", "look at its weights, and at what its forward does"
            raise ModelError("the model does not react to its input", why=why, fix=fix)
    return logits


# --- modes ---------------------------------------------------------------------------------------------------------


def batchnorm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The batch-normalisation layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def attack_mode(model: nn.Module, batchnorm: str = "unchanged") -> Iterator[None]:
    """Context in which no parameter takes a gradient and no buffer changes; everything is restored afterwards.

    ``batchnorm="unchanged"`` leaves the mode (train or eval) as it is; ``"train"`` normalises by the statistics of the
    batch under attack (Wang et al. 2023; Gowal et al. 2020); ``"eval"`` puts the network in eval mode (TRADES, MART).
    """
    require_module(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = [layer for layer in model.modules() if batchnorm == "eval" or isinstance(layer, _BatchNorm)]
    switched = [layer for layer in layers if layer.training is (batchnorm == "eval") and batchnorm != "unchanged"]

    def switch(*, inside: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(not inside)
        for layer in switched:
            layer.training = not layer.training

    switch(inside=True)
    try:
        with kept_statistics(model):
            yield
    finally:
        switch(inside=False)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which no buffer of ``model`` changes; batch normalisation in training mode normalises by the batch."""
    layers = [layer for layer in batchnorm_layers(model) if layer.track_running_stats and layer.training]
    others = [module for module in model.modules() if not isinstance(module, _BatchNorm)]
    buffers = [(module, *named) for module in others for named in module.named_buffers(recurse=False)]
    saved = [(*one, one[2].clone(), one[2]._version) for one in buffers if not one[2].is_inference()]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        for module, name, buffer, value, version in saved:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter or buffer; the CPU where there is none. Refuses what is no module."""
    require_module(model)
    return next(model.parameters(), next(model.buffers(), torch.empty(0, device="cpu"))).device


@contextmanager
def true_float32(device: str) -> Iterator[None]:
    """Context that disables TF32 (torch's default for convolutions on a GPU) and autocast on a device of this type."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
