"""``puma score --from-run``: scores that need a training, over the snapshots of one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import typer


def score_from_run(
    run: Path,
    sources: list[str],
    out: Path,
    *,
    roles: str | None,
    rows: str,
    features: Path | None,
    batch_size: int | None,
    part_rows: int,
    device: str,
    threads: int,
    worker: int,
    num_workers: int,
    quiet: bool,
) -> None:
    """Score the pool over a run's snapshots into ``out``, and embed it into ``features`` if that is given."""
    import torch

    from puma.data.load import load_dataset
    from puma.data.pool import Pool
    from puma.scoring.embed import embed
    from puma.scoring.from_run import SCORES, load_snapshots, score_run
    from puma.scoring.job import resolve_device

    if threads:
        torch.set_num_threads(threads)
    place = resolve_device(device)
    pool = Pool([load_dataset(source) for source in sources], roles=None if roles is None else roles.split(","))
    table = score_run(
        run,
        pool,
        out=out,
        rows=rows,  # type: ignore[arg-type]  # checked there
        batch_size=batch_size or (1024 if place.type == "cuda" else 256),
        part_rows=part_rows,
        device=place,
        worker=worker,
        num_workers=num_workers,
        progress=not quiet,
    )
    if table is None:
        typer.echo(f"this worker's parts are in {out}; others are still missing")
    else:
        typer.echo(f"{len(table):,} images scored in {out}; give it to puma plan as another --table")
        for name in SCORES:
            scores = table.scores[name][~np.isnan(table.scores[name])]
            low, middle, high = np.quantile(scores, [0.1, 0.5, 0.9]) if len(scores) else (np.nan,) * 3
            typer.echo(f"  {name:20} 10 % below {low:.4g}, median {middle:.4g}, 10 % above {high:.4g}")
    if features is not None and worker == 0:
        embed(load_snapshots(run)[-1].to(place), pool, features, part_rows=part_rows, progress=not quiet)
        typer.echo(f"feature vectors in {features}; give them to puma plan as --features")
