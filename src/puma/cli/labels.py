"""``puma data labels`` and ``puma data drop-label-issues``: label quality, and plans without label issues."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puma.cli.options import Device, DryRun, Quiet, Threads
from puma.cli.output import duration, echo
from puma.cli.plan import check_plan_path, read_tables
from puma.cli.score import MarginModel, PartRows, Roles, Sources, Weights

if TYPE_CHECKING:
    from puma.data.pool import Pool
    from puma.margins import MarginTable


def labels(
    model: MarginModel,
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", help="Folder of the score table; what is finished there is kept.")],
    weights: Weights = None,
    roles: Roles = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 512,
    part_rows: PartRows = 65_536,
    device: Device = "auto",
    threads: Threads = 0,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Estimate which labels of a pool are wrong: one forward pass, two columns beside the margins.

    label_quality, 0 to 1: below 0.5 the model gives another class. label_issue: 1 where the label is probably wrong
    (cleanlab, extra "labels"). The model should not have been trained on these labels.
    Interrupted or killed, the same command goes on.

    Example: puma data labels model.safetensors digits synthetic.npz --out label-quality
    """
    import torch

    from puma.evaluation import estimate_cost
    from puma.scoring.job import open_model, open_pool
    from puma.scoring.labels import score_labels

    if threads:
        torch.set_num_threads(threads)
    pool = open_pool(tuple(sources), None if roles is None else tuple(roles.split(",")))
    network = open_model(model, None if weights is None else str(weights), device)
    if dry_run:
        seconds = estimate_cost(network, pool, attack="clean", batch_size=batch_size).seconds
        echo(f"images   {len(pool):,}, one forward pass each\ntime     about {duration(seconds)}")
        return
    if _trained_on(Path(model), pool):
        echo("note: this model was trained on these very labels and has memorized some wrong ones: fewer are flagged")
    table = score_labels(network, pool, out=out, batch_size=batch_size, part_rows=part_rows, progress=not quiet)
    _print_sources(table)
    echo(f"written to {out}; it joins the margins: puma plan --table margins --table {out}")


def drop_label_issues(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    table: Annotated[list[Path], typer.Option("--table", help="Margin table; again for that of `puma data labels`.")],
    out: Annotated[Path, typer.Option("--out", help="Plan to write, a .parquet file.")],
    below: Annotated[
        float | None,
        typer.Option(help="All with label_quality below this, 0 to 1; none: those flagged as label_issue."),
    ] = None,
) -> None:
    """Write a plan without the synthetic images whose label is probably wrong; all else stays as it is.

    They go on top of what the plan's strategy removed. Real images are never taken out.

    Example: puma data drop-label-issues plan.parquet --table margins --table label-quality --out trusted.parquet
    """
    from puma.plan import Plan
    from puma.strategies import drop_label_issues as without_label_issues

    check_plan_path(out)
    margins, before = read_tables(table), Plan.read(plan)
    cleaned = without_label_issues(before, margins, below)
    cleaned.write(out)
    echo(f"{before.kept - cleaned.kept:,} of {before.kept:,} kept images removed, {cleaned.kept:,} are left")
    for warning in cleaned.warnings:
        echo(f"warning: {warning}")
    echo(f"written to {out}")


def _trained_on(run: Path, pool: Pool) -> bool:
    """Whether the model is that of a run on this pool, its synthetic rows included."""
    from puma.io import read_json

    record = run / "run.json"
    return record.is_file() and read_json(record).get("settings", {}).get("pool") == pool.fingerprint


def _print_sources(table: MarginTable) -> None:
    from puma.margins import LABEL_ISSUE, LABEL_QUALITY

    agrees, flagged = table.scores[LABEL_QUALITY] > 0.5, table.scores[LABEL_ISSUE] == 1
    for code, source in enumerate(table.sources):
        mine, name = table.source == code, source["name"]
        echo(
            f"{name} ({source['role']}, {source['rows']:,}): the model agrees with {agrees[mine].mean():.2%} "
            f"of the labels; {flagged[mine].sum():,} are probably wrong ({flagged[mine].mean():.2%})"
        )
