"""Scores that need a training run: how images fare over the snapshots that a run kept.

A run keeps K averaged networks along the way if its recipe says ``snapshots = K``. Every image of the pool is attacked
with each of them (PGD, the run's threat model), which gives four scores: a table of the same shape as a margin table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puma.attacks.pgd import pgd
from puma.data.pool import Pool, read_batch
from puma.data.source import Source
from puma.errors import DataError, ModelError, integer, unknown
from puma.io import read_json
from puma.margins import PART_ROWS, Columns, MarginTable, Status
from puma.models.checks import apply_model
from puma.models.modes import device_of
from puma.models.weights import load_model
from puma.rng import batch_seed
from puma.scoring.parts import Compute, TableParts, as_pool, check_model, pool_columns, table_meta
from puma.threat import ThreatModel

SCORES = ("dynamic-uncertainty", "el2n-adv", "input-gradient", "robust-failure")
MIN_SNAPSHOTS = 2
Rows = Literal["all", "real"]


@dataclass(frozen=True)
class SnapshotSettings:
    """Everything but the snapshots and the pool that decides the scores.

    Args:
        threat: the attack.
        rows: ``"all"``, or ``"real"``: synthetic rows get NaN at no cost, to be extrapolated from their neighbors
            (`puma.strategies.selectors.extrapolate`).
        steps: PGD steps, cross-entropy, uniform start.
        batch_size: images attacked together; its boundaries are fixed within a part.
        part_rows: rows of one part.
        seed: of the attack's starts.

    Raises:
        UsageError: a number that is not positive, or another choice of rows.
    """

    threat: ThreatModel
    rows: Rows = "all"
    steps: int = 10
    batch_size: int = 256
    part_rows: int = PART_ROWS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows not in ("all", "real"):
            raise unknown("choice of rows", self.rows, ("all", "real"))
        for name, least in (("steps", 1), ("batch_size", 1), ("part_rows", 1), ("seed", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low=least))

    def meta(self, models: Sequence[nn.Module], pool: Pool) -> dict[str, Any]:
        """The metadata of the table, as in `puma.margins.MarginTable`."""
        settings = asdict(self) | {"eps": self.threat.eps, "snapshots": len(models)}
        del settings["threat"]
        return table_meta("snapshots", self.threat.norm, settings, pool, *models)


def score_run(
    run: Path | str,
    pool: Pool | Source,
    *,
    out: Path | str,
    threat: ThreatModel | str | None = None,
    device: torch.device | str = "cpu",
    like: nn.Module | None = None,
    progress: bool = False,
    **settings: Any,
) -> MarginTable:
    """Score every image of a pool over the snapshots of a run. Resumes by itself.

    Args:
        run: folder of a run that was trained with ``snapshots = K`` in its recipe, K at least 2.
        pool: a `Pool`, or one source; need not be what the run was trained on.
        out: folder of the table.
        threat: the attack; the run's own unless given.
        device: where the networks run.
        like: a network of the run's architecture, where PUMA did not build it.
        progress: show a bar.
        settings: ``rows, steps, batch_size, part_rows, seed`` of `SnapshotSettings`.

    Returns:
        A table with the columns `SCORES` and NaN margins, to be joined to a margin table of the same pool.

    Raises:
        ModelError: the run has fewer than two snapshots, or they do not fit the pool.
        ResumeError: ``out`` holds another table, or is being written.
        UsageError: a setting that cannot be used.
    """
    chosen = SnapshotSettings(threat_of(run) if threat is None else ThreatModel.parse(threat), **settings)
    models = [model.to(device) for model in load_snapshots(run, like)]
    parts, compute = snapshot_parts(models, as_pool(pool), chosen, out)
    with parts.held():
        parts.make(range(len(parts.ranges)), compute, progress)
    return MarginTable.read(out)


def snapshot_parts(
    models: Sequence[nn.Module], pool: Pool, settings: SnapshotSettings, out: Path | str
) -> tuple[TableParts, Compute]:
    """The parts of a table of snapshot scores, and how their columns are computed."""
    check_model(models[-1], pool)
    parts = TableParts(out, settings.meta(models, pool), device_of(models[-1]))
    return parts, lambda rows, done: score_rows(models, pool, rows, settings, done)


def score_rows(
    models: Sequence[nn.Module], pool: Pool, rows: range, settings: SnapshotSettings, done: Callable[[int], None]
) -> Columns:
    """The columns of consecutive rows; ``done`` is called with the number of images after each batch."""
    index = np.arange(rows.start, rows.stop, dtype=np.int64)
    columns = pool_columns(pool, index) | {
        "predicted": np.full(len(index), -1, np.int16),
        "status": np.full(len(index), Status.NAN, np.int8),
        "steps": np.zeros(len(index), np.int16),
    }
    columns |= {name: np.full(len(index), np.nan, np.float32) for name in SCORES}
    wanted = index if settings.rows == "all" else index[~pool.synthetic[index]]
    done(len(index) - len(wanted))
    for first in range(0, len(wanted), settings.batch_size):
        batch = wanted[first : first + settings.batch_size]
        images, labels = read_batch(pool, batch, device_of(models[-1]))
        generator = torch.Generator(images.device).manual_seed(batch_seed(settings.seed, int(batch[0])))
        observed = observe(models, images, labels, settings.threat, settings.steps, generator)
        places = batch - rows.start
        columns["predicted"][places] = observed.predicted[-1].cpu().numpy()
        columns["steps"][places] = len(models)
        for name, values in observed.scores().items():
            columns[name][places] = values
        done(len(batch))
    return columns


@dataclass(frozen=True)
class Observed:
    """Outputs of K snapshots on B images.

    Args:
        probability: float ``[K, B]``, of the label on the attacked image.
        error: float ``[K, B]``, Euclidean norm of (probabilities - one-hot label) on the attacked image.
        failed: bool ``[K, B]``, the attack changes the class.
        gradient: float ``[K, B]``, Euclidean norm of the loss gradient at the clean image.
        predicted: int ``[K, B]``, class of the clean image.
    """

    probability: Tensor
    error: Tensor
    failed: Tensor
    gradient: Tensor
    predicted: Tensor

    def scores(self, window: int = 10) -> dict[str, NDArray[np.float32]]:
        """The four scores, float32 ``[B]`` each.

        - ``el2n-adv``: mean error over the snapshots (arXiv 2107.07075, on attacked images); higher is harder.
        - ``robust-failure``: share of snapshots on which the attack succeeds (arXiv 2102.07437); higher is harder.
        - ``input-gradient``: mean gradient norm (EasyCore, arXiv 2510.11018); higher is harder.
        - ``dynamic-uncertainty``: standard deviation of the label's probability in a window of snapshots (all, if
          there are fewer), averaged over windows (arXiv 2306.05175; attacked arXiv 2406.13283); higher is less certain.
        """
        windows = self.probability.double().unfold(0, min(window, len(self.probability)), 1)  # [W, B, window]
        scores = {
            "el2n-adv": self.error.double().mean(0),
            "robust-failure": self.failed.double().mean(0),
            "input-gradient": self.gradient.double().mean(0),
            "dynamic-uncertainty": windows.std(dim=2, unbiased=True).mean(0),
        }
        return {name: values.float().cpu().numpy() for name, values in scores.items()}


def observe(
    models: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    steps: int = 10,
    generator: torch.Generator | None = None,
) -> Observed:
    """Attack a batch with each of ``models`` (in eval mode).

    Args:
        models: K networks.
        images: float ``[B, C, H, W]`` in [0, 1].
        labels: int64 ``[B]``.
        threat: norm and eps of the attack.
        steps: PGD steps.
        generator: for the attack's starts, on the images' device.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in Observed.__dataclass_fields__}
    for model in models:
        attacked = pgd(model, images, labels, threat=threat, steps=steps, generator=generator)
        clean = images.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = apply_model(model, clean)
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, clean)
        with torch.no_grad():
            output = apply_model(model, attacked).float()
        probability = output.softmax(1)
        own = probability.gather(1, labels[:, None]).squeeze(1)
        target = nn.functional.one_hot(labels, probability.shape[1]).to(probability.dtype)
        rows["probability"].append(own)
        rows["error"].append((probability - target).norm(dim=1))
        rows["failed"].append(output.argmax(1) != labels)
        rows["gradient"].append(gradient.flatten(1).norm(dim=1))
        rows["predicted"].append(logits.detach().argmax(1))
    return Observed(**{name: torch.stack(parts) for name, parts in rows.items()})


def load_snapshots(run: Path | str, like: nn.Module | None = None) -> list[nn.Module]:
    """The averaged networks a run kept along the way, earliest first, in eval mode.

    Raises:
        ModelError: fewer than two, or one is damaged.
    """
    paths = sorted((Path(run) / "snapshots").glob("step-*.safetensors"))
    if len(paths) < MIN_SNAPSHOTS:
        raise ModelError(
            f"{run} has {len(paths)} snapshots, at least {MIN_SNAPSHOTS} are needed",
            why="a run keeps them only if its recipe says so",
            fix="train again with snapshots = 10 in the recipe (`puma recipe show`)",
        )
    return [load_model(path, like) for path in paths]


def threat_of(run: Path | str) -> ThreatModel:
    """The threat model a run was trained against.

    Raises:
        DataError: the folder is not a run.
    """
    try:
        settings = read_json(Path(run) / "run.json")["settings"]
        return ThreatModel(ThreatModel.parse(settings["threat"]).norm, settings["eps"])
    except (KeyError, TypeError):
        raise DataError(f"{run} does not say what it was trained against", fix="give the threat model") from None
