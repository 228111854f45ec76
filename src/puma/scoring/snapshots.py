"""Scores that need a training run: how images fare over the snapshots that a run kept; and feature vectors.

A run keeps K averaged networks along the way if its recipe says ``snapshots = K``. Every image of the pool is attacked
with each (PGD, the run's threat model): four scores, a table of the same shape as a margin table.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from puma.io import Shards, read_json, spans
from puma.margins import PART_ROWS, Columns, MarginTable, Status
from puma.models.checks import apply_model, device_of
from puma.models.weights import load_model, weights_sha256
from puma.rng import batch_seed
from puma.scoring.parts import Done, Rows, TableParts, checked_pool, pool_columns, table_meta, write_arrays
from puma.strategies.selectors import RECORD
from puma.threat import ThreatModel

SCORES = ("dynamic-uncertainty", "el2n-adv", "input-gradient", "robust-failure")


@dataclass(frozen=True)
class SnapshotSettings:
    """Everything but the snapshots and the pool that decides the scores; `UsageError` for what cannot be used."""

    threat: ThreatModel
    rows: Literal["all", "real"] = "all"  # real: synthetic ones get NaN at no cost, to be filled by `extrapolate`
    steps: int = 10  # of PGD with cross-entropy and a uniform start
    batch_size: int = 256  # images attacked together; its boundaries are fixed within a part
    part_rows: int = PART_ROWS
    seed: int = 0  # of the attack's starts

    def __post_init__(self) -> None:
        if self.rows not in ("all", "real"):
            raise unknown("choice of rows", self.rows, ("all", "real"))
        for name, least in (("steps", 1), ("batch_size", 1), ("part_rows", 1), ("seed", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low=least))

    def meta(self, models: Sequence[nn.Module], pool: Pool) -> dict[str, Any]:
        """The metadata of the table that the snapshots ``models`` give."""
        settings = asdict(self) | {"eps": self.threat.eps, "snapshots": len(models)}
        del settings["threat"]
        return table_meta("snapshots", self.threat.norm, settings, pool, *models)

    def score_rows(self, models: Sequence[nn.Module], pool: Pool, rows: Rows, done: Done) -> Columns:
        """The columns of some rows; ``done`` is called with the number of images after each batch."""
        index = np.asarray(rows, dtype=np.int64)
        columns = pool_columns(pool, index) | {
            "predicted": np.full(len(index), -1, np.int16),
            "status": np.full(len(index), Status.NAN, np.int8),
            "steps": np.zeros(len(index), np.int16),
        }
        columns |= {name: np.full(len(index), np.nan, np.float32) for name in SCORES}
        wanted = np.flatnonzero((self.rows == "all") | ~pool.synthetic[index])
        done(len(index) - len(wanted))
        for span in spans(len(wanted), self.batch_size):
            places = wanted[span]
            images, labels = read_batch(pool, index[places], device_of(models[-1]))
            generator = torch.Generator(images.device).manual_seed(batch_seed(self.seed, int(index[places[0]])))
            observed = observe(models, images, labels, self.threat, self.steps, generator)
            columns["predicted"][places] = observed.predicted[-1].cpu().numpy()
            columns["steps"][places] = len(models)
            for name, values in observed.scores().items():
                columns[name][places] = values
            done(len(span))
        return columns


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
    """Score every image of a pool over the snapshots of a run (``snapshots = K`` in its recipe). Resumes by itself.

    The pool need not be what the run was trained on. The table in ``out`` has the columns `SCORES` and NaN margins, to
    be joined to a margin table. ``threat`` is the attack, the run's own unless given; ``like`` a network of the run's
    architecture, where PUMA did not build it; ``settings`` are those of `SnapshotSettings`. `ModelError` if the run
    has fewer than two snapshots, or they do not fit the pool.
    """
    chosen = SnapshotSettings(threat_of(run) if threat is None else ThreatModel.parse(threat), **settings)
    models = [model.to(device) for model in load_snapshots(run, like)]
    return TableParts(out, chosen, models, checked_pool(models[-1], pool)).make_all(progress)


@dataclass(frozen=True)
class Observed:
    """Outputs of K snapshots on B images, ``[K, B]`` each."""

    probability: Tensor  # of the label on the attacked image
    error: Tensor  # Euclidean norm of (probabilities - one-hot label) on the attacked image
    failed: Tensor  # bool, the attack changes the class
    gradient: Tensor  # Euclidean norm of the loss gradient at the clean image
    predicted: Tensor  # class of the clean image

    def scores(self, window: int = 10) -> dict[str, NDArray[np.float32]]:
        """The four scores, float32 ``[B]`` each; higher is harder, or less certain.

        ``el2n-adv``: mean error over the snapshots (arXiv 2107.07075, on attacked images). ``robust-failure``: share of
        snapshots on which the attack succeeds (arXiv 2102.07437). ``input-gradient``: mean gradient norm (EasyCore,
        arXiv 2510.11018). ``dynamic-uncertainty``: standard deviation of the label's probability in a window of
        snapshots (all, if there are fewer), averaged over windows (arXiv 2306.05175; attacked arXiv 2406.13283).
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
    """Attack images ``[B, C, H, W]`` in [0, 1] with each of ``models``, in eval mode, from the generator's starts."""
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
    """The averaged networks a run kept, earliest first, in eval mode; `ModelError` if fewer than two or damaged."""
    paths = sorted((Path(run) / "snapshots").glob("step-*.safetensors"))
    if len(paths) < 2:
        fix = "train again with snapshots = 10 in the recipe (`puma recipe show`)"
        why = "a run keeps them only if its recipe says so"
        raise ModelError(f"{run} has {len(paths)} snapshots, at least 2 are needed", why=why, fix=fix)
    return [load_model(path, like) for path in paths]


def threat_of(run: Path | str) -> ThreatModel:
    """The threat model a run was trained against; `DataError` if the folder is not a run."""
    try:
        settings = read_json(Path(run) / "run.json")["settings"]
        return ThreatModel(ThreatModel.parse(settings["threat"]).norm, settings["eps"])
    except (KeyError, TypeError):
        raise DataError(f"{run} does not say what it was trained against", fix="give the threat model") from None


def embed(
    model: nn.Module,
    pool: Pool | Source,
    out: Path | str,
    *,
    batch_size: int = 512,
    part_rows: int = PART_ROWS,
    progress: bool = False,
) -> Path:
    """Write the input of the model's last linear layer for every image: the ``features`` that strategies take.

    ``out`` receives parts ``part-000000.npy``, ... of ``part_rows`` rows, float32 ``[rows, D]``; those that are
    finished are not made again. `ModelError` if the network has no linear layer or does not fit the pool.
    """
    pool, inputs = checked_pool(model, pool), list[Tensor]()
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ModelError("the network has no linear layer", why="its input is what features are taken from")

    def features(images: Tensor) -> Tensor:
        inputs.clear()
        model(images)
        return inputs[-1].flatten(1)

    meta = {"model": weights_sha256(model), "pool": pool.fingerprint, "rows": len(pool), "part_rows": part_rows}
    shards = Shards(out, meta, suffix=".npy", record=RECORD, schema="puma.features/1")
    parts = dict(enumerate(spans(len(pool), part_rows)))
    hook = linear[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    try:
        with shards.held():
            write_arrays(shards, pool, parts, features, device_of(model), batch_size, "features", progress)
    finally:
        hook.remove()
    return Path(out)
