"""Margins for one stated plan: estimates for every image, DeepFool only where it can change the plan.

What a plan needs from a margin is which side of the prune cut an image lies on, and, below the reach of the cap on the
attack norm, how far exactly. Everywhere else the estimate of ``fast`` says enough.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from puma.attacks.deepfool import Precision
from puma.data.pool import Pool
from puma.data.source import Source
from puma.errors import UsageError
from puma.margins import PART_ROWS, MarginTable, Status
from puma.progress import Progress
from puma.scoring.health import check_model, device_of
from puma.scoring.parts import PartFolder
from puma.scoring.score import as_pool, score_margins, table_of
from puma.scoring.settings import ScoringSettings, environment, sized
from puma.scoring.stream import Columns, score_batch
from puma.strategies import make_plan
from puma.threat import ThreatModel


@dataclass(frozen=True)
class Cascade:
    """The plan that the margins are for.

    Args:
        threat: threat model of the training to come; its norm is that of the margins.
        prune_fraction: share of the prunable rows that the plan will remove.
        c: as in the plan: the cap lets an image be attacked up to ``c * margin``; its reach is ``eps / c``.
        band: images whose estimate is within this share of a cut or of the reach are measured.

    Raises:
        UsageError: ``prune_fraction``, ``c`` or ``band`` out of range.
    """

    threat: ThreatModel
    prune_fraction: float
    c: float = 0.5
    band: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.prune_fraction < 1:  # here, not after hours, when the estimates become a plan
            raise UsageError(f"prune_fraction {self.prune_fraction} is not in [0, 1)", fix="30 % is written 0.3")
        if not 0 < self.c <= 1 or not 0 <= self.band < 1:
            raise UsageError(f"c={self.c} and band={self.band}: 0 < c <= 1 and 0 <= band < 1 are needed")

    def wanted(self, estimates: MarginTable) -> NDArray[np.bool_]:
        """bool ``[N]``: rows whose margin has to be measured, given the table of `fast`.

        Those near the cut of their source and class, those below the reach of the cap, and those without an estimate.
        A misclassified image trains clean whatever its distance, so it is not measured.
        """
        margin = estimates.margin
        estimated = estimates.status == Status.ESTIMATED
        plan = make_plan(estimates, "puma", self.prune_fraction, threat=self.threat, c=self.c)
        groups = estimates.source.astype(np.int64) * estimates.num_classes + estimates.label
        cuts = np.full(groups.max() + 1, np.inf, np.float64)
        pruned = ~plan.keep & estimated
        np.minimum.at(cuts, groups[pruned], margin[pruned])
        cut = cuts[groups]
        with np.errstate(invalid="ignore"):
            near = np.isfinite(cut) & (np.abs(margin - cut) <= self.band * cut)
            reached = plan.keep & (margin < (1 + self.band) * self.threat.eps / self.c)
        missing = (estimates.status != Status.MISCLASSIFIED) & ~estimated
        result: NDArray[np.bool_] = (estimated & (near | reached)) | missing
        return result

    def record(self) -> dict[str, Any]:
        """As it stands in the table's metadata."""
        return asdict(self)


def score_cascade(
    model: nn.Module,
    pool: Pool | Source,
    cascade: Cascade,
    *,
    out: Path | str | None = None,
    steps: int = 50,
    batch_size: int | None = None,
    chunk: int | None = None,
    part_rows: int = PART_ROWS,
    precision: Precision = "float32",
    compile: bool = False,
    progress: bool = False,
) -> MarginTable:
    """Estimate every margin, then measure those that can change the stated plan.

    Args:
        model: the margin model, in eval mode.
        pool: a `Pool`, or one source.
        cascade: the plan.
        out: folder of the table; the estimates lie in its subfolder ``fast``. Both stages resume.
        steps: linearisations at most for one image.
        batch_size: images searched together.
        chunk: images per pass.
        part_rows: rows of one part.
        precision: as in `score_margins`.
        compile: as in `score_margins`.
        progress: show bars.

    Returns:
        A table in which measured rows are ``crossed`` and the others ``estimated``; ``meta["settings"]["cascade"]``
        names the plan. `make_plan` warns where another plan needs margins that were not measured for this one.

    Raises:
        ModelError, ResumeError, StorageError: as `score_margins`.
    """
    whole = as_pool(pool)
    check_model(model, whole)
    settings = sized(
        cascade.threat.norm,
        "refined",
        device_of(model).type,
        steps=steps,
        batch_size=batch_size,
        chunk=chunk,
        part_rows=part_rows,
        precision=precision,
        compile=compile,
    )
    fast_out = None if out is None else Path(out) / "fast"
    estimates = score_margins(
        model,
        whole,
        norm=cascade.threat.norm,
        mode="fast",
        out=fast_out,
        steps=steps,
        batch_size=settings.batch_size,
        chunk=settings.chunk,
        part_rows=part_rows,
        precision=precision,
        compile=compile,
        progress=progress,
    )
    wanted = cascade.wanted(estimates)
    meta = settings.meta(model, whole) | {"mode": "cascade"}
    meta["settings"] |= {"cascade": cascade.record(), "measured": int(wanted.sum())}
    if out is None:
        return table_of(_measured(model, whole, settings, estimates, wanted, 0, len(whole), None), meta)
    folder = PartFolder(out, meta, environment(device_of(model)))
    with folder.held(0, 1), Progress("margins near the cut", int(wanted.sum()), "images", show=progress) as bar:
        for part in range(folder.count):
            start, stop = folder.bounds(part)
            if folder.finished(part):
                bar.advance(int(wanted[start:stop].sum()))
            else:
                folder.write(part, _measured(model, whole, settings, estimates, wanted, start, stop, bar))
    return MarginTable.read(out)


def _measured(
    model: nn.Module,
    pool: Pool,
    settings: ScoringSettings,
    estimates: MarginTable,
    wanted: NDArray[np.bool_],
    start: int,
    stop: int,
    bar: Progress | None,
) -> Columns:
    """The estimates of rows ``start`` to ``stop`` with those wanted replaced by measurements."""
    columns = {name: np.array(column) for name, column in estimates.rows(start, stop).items()}
    rows = start + np.flatnonzero(wanted[start:stop])
    for first in range(0, len(rows), settings.batch_size):
        batch = rows[first : first + settings.batch_size]
        measured = score_batch(model, pool, batch, settings, fill=True)
        for name in ("predicted", "margin", "status", "steps"):
            columns[name][batch - start] = measured[name]
        if bar:
            bar.advance(len(batch))
    return columns
