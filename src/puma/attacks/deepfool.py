"""DeepFool, batched: how far an image lies from the decision boundary (arXiv 1511.04599), signed, in Linf or L2.

Each step linearises the boundaries between the label and a few candidate classes and goes the shortest way onto the
nearest one, staying in [0, 1] (`puma.attacks.search`); the better modes turn the ray from the image to the boundary
until it is shortest (`puma.attacks.ray`). A misclassified image goes the other way, into the region of its label, and
its margin is negative (`puma.attacks.polish`). ``docs/margins.md`` tells the story with a picture;
`benchmarks/margins.py` measures it against its peers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.attacks.network import Network
from puma.attacks.polish import polish
from puma.attacks.ray import Rays
from puma.attacks.region import farthest
from puma.attacks.search import Search
from puma.errors import DataError, UsageError, unknown
from puma.margins import STATUS_NAMES, Status
from puma.models.modes import true_float32
from puma.threat import Norm, parse_norm

Mode = Literal["fast", "deepfool", "refined", "tight"]
MODES: tuple[Mode, ...] = get_args(Mode)
Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Effort:
    """What a mode spends.

    Args:
        candidates: classes linearised at the image.
        doubtful: further ones, linearised only for the images to which they might be nearer.
        tilts: shares of the way that the ray to the boundary is turned towards the boundary's normal, one a round.
        settled: a ray is left alone when the boundary linearised where it crosses is at most this share nearer.
        walks: rounds along the boundary, at most, where it bends so that a ray's crossing is not near enough.
        polishes: as many for a misclassified image, on its way back.
    """

    candidates: int
    doubtful: int = 0
    tilts: tuple[float, ...] = ()
    settled: float = 0.0
    walks: int = 0
    polishes: int = 0


EFFORTS: dict[Mode, Effort] = {
    "fast": Effort(candidates=3),
    "deepfool": Effort(candidates=2, doubtful=2),
    "refined": Effort(candidates=4, tilts=(0.7, 0.4, 0.3), settled=0.02, polishes=1),
    "tight": Effort(
        candidates=5, tilts=(0.7, 0.5, 0.4, 0.32, 0.26, 0.22, 0.2, 0.18), settled=0.01, walks=8, polishes=4
    ),
}


@dataclass(frozen=True)
class DeepFool:
    """Margins of a batch.

    Args:
        margin: float32 ``[B]``, signed distance in pixel units of [0, 1]; see `puma.margins.Status` for its meaning.
        codes: int8 ``[B]``, codes of `puma.margins.Status`.
        steps: int16 ``[B]``, linearisations spent before the boundary was crossed.
        predicted: int64 ``[B]``, the model's class for the image.
        adversarial: ``[B, ...]``, the point beyond the boundary (inside the label's region for a misclassified image);
            the image itself where none was found.
        passes: images passed forwards and backwards through the model.
    """

    margin: Tensor
    codes: Tensor
    steps: Tensor
    predicted: Tensor
    adversarial: Tensor
    passes: tuple[int, int]

    @property
    def status(self) -> NDArray[np.str_]:
        """Names of the statuses, str ``[B]``."""
        names: NDArray[np.str_] = np.array(STATUS_NAMES)[self.codes.cpu().numpy()]
        return names


def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm = "Linf",
    mode: Mode = "refined",
    steps: int = 50,
    chunk: int = 64,
    precision: Precision = "float32",
    proxy: nn.Module | None = None,
) -> DeepFool:
    """Measure the margins of ``images``.

    Args:
        model: maps float images in [0, 1] to logits ``[B, K]``; in eval mode. It is not changed, nor are its gradients.
        images: float32 ``[B, ...]`` in [0, 1].
        labels: int64 ``[B]``.
        norm: ``"Linf"`` or ``"L2"``.
        mode: ``"fast"`` estimates from one linearisation and one look; ``"deepfool"`` is plain DeepFool; ``"refined"``
            finds a nearby point of the boundary, ``"tight"`` looks longer for a nearer one.
        steps: linearisations at most before an image counts as unconverged.
        chunk: images per pass through the model.
        precision: ``"bf16"`` computes gradients under bfloat16 autocast; crossings are always seen in float32.
        proxy: a faster stand-in for ``model`` during the search, such as ``torch.compile(model, dynamic=False)``. It is
            given batches of at most four sizes, and every crossing is confirmed by ``model`` itself.

    Raises:
        UsageError: unknown norm, mode or precision.
        DataError: images outside [0, 1] or not float32, labels that do not fit.
        ModelError: the model is in training mode or does not return logits.
    """
    parse_norm(norm)
    parse_mode(mode)
    parse_precision(precision)
    if steps < 1 or chunk < 1:
        raise UsageError(f"steps and chunk have to be positive, not {steps} and {chunk}")
    check_images(images, labels)
    network = Network(model, tuple(images.shape[1:]), chunk, precision == "bf16", proxy)
    with torch.no_grad(), true_float32(images.device.type), network.compiling():
        search = Search(network, images.detach().flatten(1), labels.to(images.device), norm)
        if search.classes > 1 and len(images):
            _spend(search, mode, steps)
        elif len(images):
            search.look(torch.arange(len(images), device=images.device), network.exact(search.start))
        if proxy is not None and mode != "fast":
            search.confirm()
    return _result(search, images)


def parse_mode(text: str) -> Mode:
    """Return the mode called ``text``.

    Raises:
        UsageError: there is none.
    """
    if text not in MODES:
        raise unknown("mode", text, MODES)
    return text


def parse_precision(text: str) -> Precision:
    """Return the precision called ``text``.

    Raises:
        UsageError: there is none.
    """
    if text not in PRECISIONS:
        raise unknown("precision", text, PRECISIONS)
    return text


def check_images(images: Tensor, labels: Tensor) -> None:
    """Refuse images and labels that cannot be scored.

    Raises:
        DataError: as told in `deepfool`.
    """
    if images.dtype != torch.float32:
        raise DataError(
            f"images are {images.dtype}", why="margins are measured in float32", fix="images.float() / 255?"
        )
    if images.ndim < 2:
        raise DataError(f"images have shape {list(images.shape)}", why="[B, ...] is needed: a batch of images")
    if len(images) and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = float(images.min()), float(images.max())
        raise DataError(
            f"images reach from {low:g} to {high:g}", why="pixels have to lie in [0, 1]", fix="divide by 255?"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise DataError(
            f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images", why="[B] int is needed"
        )


def _spend(search: Search, mode: Mode, steps: int) -> None:
    """Run the search of a mode."""
    effort = EFFORTS[mode]
    rays = None if mode == "deepfool" else Rays(search)
    ahead, straight, behind = _first_look(search, effort.candidates, rays, mode == "fast")
    if rays is not None and len(ahead):
        rays.probe(ahead, both=mode != "fast")
        if mode == "fast":
            search.distance[ahead] = rays.lengths(ahead)
            search.codes[ahead] = int(Status.ESTIMATED)
            search.best = search.start.clone()  # a crossing that the look may have met is not what an estimate is about
        else:
            rays.tilt(ahead, effort.tilts[: steps - 1], effort.settled)
            rays.trim(ahead)
            polish(search, ahead, 1, effort.walks, back=False)
            straight = torch.cat([straight, ahead[search.distance[ahead].isinf()]])
    if mode == "fast":
        return
    short = search.reconsider(straight, search.short(straight), effort.candidates, effort.doubtful)
    search.approach(short, 1, back=False, steps=steps)
    search.approach(search.short(behind), effort.candidates, back=True, steps=steps)
    if search.network.coarse:
        _search_again(search, effort.candidates, steps)
    polish(search, behind, 2 * effort.candidates + 1, effort.polishes, back=True)


def _search_again(search: Search, candidates: int, steps: int) -> None:
    """Look with exact gradients for the crossings that coarse ones missed: close to a boundary they lead nowhere."""
    search.network.coarse = False
    lost = search.distance.isinf() & ((search.codes == int(Status.UNCONVERGED)) | search.wrong)
    for back in (False, True):
        rows = (lost & (search.wrong == back)).nonzero().squeeze(1)
        search.x[rows] = search.start[rows]
        search.approach(rows, candidates, back=back, steps=steps)
    search.network.coarse = True


def _first_look(search: Search, candidates: int, rays: Rays | None, rank: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One linearisation at the images themselves.

    Returns the rows that have a ray to follow, those for plain DeepFool (without ``rays`` all, taken a first step; else
    those whose boundaries the box keeps out of reach), and the misclassified ones, a step nearer to their label; in
    ``fast`` these have got their estimate instead.
    """
    everything = torch.arange(len(search.start), device=search.start.device)
    kinds = torch.zeros_like(everything)  # 1 ahead, 2 straight, 3 behind
    for here, _, difference, normals, found in search.planes(everything, search.start, candidates, first=True):
        at = everything[here]
        gaps = search.pad[at].unsqueeze(1) - difference
        for back in (False, True):
            mine = (found & (search.wrong[at] == back)).nonzero().squeeze(1)
            if not len(mine):
                continue
            rows, w, b = at[mine], normals[mine], gaps[mine]
            if back and rank:
                search.distance[rows] = farthest(1 - search.start[rows], search.start[rows], w, b, search.norm)
                continue
            if not back and rays is not None:
                kinds[rows] = torch.where(rays.offer(rows, w, b), 1, 2)
                continue
            move = search.shortest(search.start[rows], w, b, back)
            search.x[rows] = (search.start[rows] + move).clamp(0, 1)
            kinds[rows] = torch.where(move.abs().amax(1) > 0, 3 if back else 2, 0)
    search.steps += 1
    return tuple((kinds == kind).nonzero().squeeze(1) for kind in (1, 2, 3))  # type: ignore[return-value]


def _result(search: Search, images: Tensor) -> DeepFool:
    """Put signs and statuses in place."""
    found = search.distance.isfinite()
    crossed = found & ~search.wrong & (search.codes != int(Status.ESTIMATED))
    search.codes = torch.where(crossed, int(Status.CROSSED), search.codes).to(torch.int8)
    margin = torch.where(search.wrong, -search.distance, search.distance)
    margin = torch.where(search.codes >= int(Status.UNCONVERGED), torch.nan, margin)
    return DeepFool(
        margin=margin,
        codes=search.codes,
        steps=search.steps.to(torch.int16),
        predicted=search.predicted,
        adversarial=search.best.view_as(images),
        passes=(search.network.forwards, search.network.backwards),
    )
