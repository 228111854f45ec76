"""``puma score``: the margin of every image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puma.cli.options import Config, Quiet
from puma.errors import UsageError, unknown

if TYPE_CHECKING:
    from puma.margins import MarginTable
    from puma.scoring.cascade import Cascade
    from puma.scoring.estimate import Estimate
    from puma.scoring.job import ScoringJob

Sizes = dict[str, Any]


def score(
    model: Annotated[str, typer.Argument(help="Margin model: weights file, run folder, or package.module:factory.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the margin table; what is finished there is kept.")],
    sources: Annotated[list[str] | None, typer.Argument(help="The pool: data sources, real ones first.")] = None,
    norm: Annotated[
        str | None,
        typer.Option(help='"Linf" or "L2"; it has to be that of the threat model.', show_default="Linf"),
    ] = None,
    mode: Annotated[str, typer.Option(help="fast (estimates), deepfool, refined, tight; cascade.")] = "refined",
    weights: Annotated[Path | None, typer.Option(help="Safetensors weights for a factory.")] = None,
    roles: Annotated[str | None, typer.Option(help="real,synthetic,... one for each source.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Linearisations at most for one image.")] = 50,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images searched together.")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Images per pass through the model.")] = None,
    part_rows: Annotated[int, typer.Option(min=1, help="Rows of one part file.")] = 65_536,
    precision: Annotated[str, typer.Option(help="Of gradients: float32 or bf16; crossings in float32.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Search with torch.compile's model.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0 leaves it to torch.")] = 0,
    worker: Annotated[int | None, typer.Option(min=0, help="This process (else torchrun's or SLURM's).")] = None,
    num_workers: Annotated[int | None, typer.Option(min=1, help="Processes that share --out.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Start so many workers here, one a device.")] = 1,
    engine: Annotated[str, typer.Option(help="process, or ray (--out seen by every machine).")] = "process",
    address: Annotated[str | None, typer.Option(help="Ray cluster, as host:6379; none: one here.")] = None,
    from_run: Annotated[
        Path | None,
        typer.Option(help="Not margins but scores over this run's snapshots; no MODEL, only sources."),
    ] = None,
    rows: Annotated[str, typer.Option(help="With --from-run: all, or real (to be extrapolated).")] = "all",
    threat: Annotated[str | None, typer.Option(help="With --mode cascade: the plan's threat, as Linf:8/255.")] = None,
    prune_fraction: Annotated[
        float | None, typer.Option(help="With --mode cascade: what the plan will prune.", show_default="0.3")
    ] = None,
    c: Annotated[
        float | None,
        typer.Option("--c", help="With --mode cascade: the plan's c, share of the margin.", show_default="0.5"),
    ] = None,
    features: Annotated[Path | None, typer.Option(help="With --from-run: folder for feature vectors.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost, and stop.")] = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Measure how far every image of a pool lies from the margin model's decision boundary (DeepFool).

    Positive margins: the model is right, higher is easier. Negative: it is wrong, and so far away is its label.
    Interrupted or killed, the same command goes on. Several processes may share one --out: give each --worker i
    --num-workers n, or start them with torchrun or srun, or use --devices n on one machine, or --engine ray.

    --mode cascade with --threat, --prune-fraction and --c estimates every margin and measures only those that can
    change that plan. One process does it.

    With --from-run RUN four other scores are made (el2n-adv, robust-failure, dynamic-uncertainty, input-gradient), from
    the snapshots that RUN kept because its recipe says snapshots = K.
    """
    from puma.attacks.deepfool import MODES
    from puma.scoring.job import ScoringJob
    from puma.scoring.workers import place_from_environment, run_on_devices

    me, among, local = (worker, num_workers, 0) if worker is not None else place_from_environment()
    cascade = None
    if mode not in (*MODES, "cascade"):
        raise unknown("mode", mode, (*MODES, "cascade"))
    if mode == "cascade":
        _refuse_with_cascade(dry_run, from_run is not None, engine == "ray" or devices > 1 or (among or 1) > 1)
        cascade = _cascade(norm, threat, prune_fraction, c)
    elif (threat, prune_fraction, c) != (None, None, None):
        raise UsageError("--threat, --prune-fraction and --c belong to --mode cascade", fix="leave them out")
    if engine not in ("process", "ray"):
        raise unknown("engine", engine, ("process", "ray"))
    if (worker is None) != (num_workers is None):
        raise UsageError("--worker and --num-workers go together")
    if engine == "ray" and (worker is not None or devices > 1):
        raise UsageError("--engine ray divides the work itself", fix="leave out --worker, --num-workers and --devices")
    if devices > 1 and worker is not None:
        raise UsageError("--devices numbers its workers itself", fix="leave out --worker and --num-workers")
    if devices > 1 and not dry_run:
        sys.exit(run_on_devices(sys.argv[1:], devices, _device_type(device)))
    if from_run is None and not sources:
        raise UsageError("no data source is given", fix="puma score MODEL SOURCE... --out FOLDER")
    if device == "auto" and local and _device_type("auto") == "cuda":
        device = f"cuda:{local}"
    if from_run is not None:
        if dry_run or engine == "ray":
            raise UsageError(
                "--from-run works without --dry-run and --engine ray", fix="use --devices or --num-workers"
            )
        from puma.cli.from_run import score_from_run

        score_from_run(
            from_run,
            [model, *(sources or [])],
            out,
            roles=roles,
            rows=rows,
            features=features,
            batch_size=batch_size,
            part_rows=part_rows,
            device=device,
            threads=threads,
            worker=me,
            num_workers=among or 1,
            quiet=quiet,
        )
        return
    job = ScoringJob(
        model=model,
        sources=tuple(sources or ()),
        weights=None if weights is None else str(weights),
        roles=None if roles is None else tuple(roles.split(",")),
        device=device,
        threads=threads,
    )
    sizes: Sizes = {"steps": steps, "batch_size": batch_size, "chunk": chunk, "part_rows": part_rows}
    sizes |= {"precision": precision, "compile": compile}
    norm = norm or "Linf"
    if cascade is not None:
        from puma.scoring.cascade import score_cascade

        net, pool = job.open()
        _print_table(score_cascade(net, pool, cascade, out=out, progress=not quiet, **sizes), out)
    elif dry_run:
        _print_estimate(_estimated(job, norm, mode, sizes, out, devices if devices > 1 else among or 1))
    elif engine == "ray":
        _print_table(_on_ray(job, norm, mode, sizes, out, address, quiet), out)
    else:
        _print_table(_here(job, norm, mode, sizes, out, me, among or 1, quiet), out)


def _here(
    job: ScoringJob, norm: str, mode: str, sizes: Sizes, out: Path, worker: int, workers: int, quiet: bool
) -> MarginTable | None:
    from puma.attacks.deepfool import parse_mode
    from puma.scoring import score_margins
    from puma.threat import parse_norm

    distance, effort = parse_norm(norm), parse_mode(mode)
    model, pool = job.open()
    table: MarginTable | None = score_margins(
        model,
        pool,
        norm=distance,
        mode=effort,
        out=out,
        worker=worker,
        num_workers=workers,
        progress=not quiet,
        **sizes,
    )
    return table


def _refuse_with_cascade(dry_run: bool, from_run: bool, several: bool) -> None:
    """Say what a cascade cannot do, before a model is opened or a process started."""
    if from_run:
        raise UsageError("--mode cascade measures margins, --from-run makes other scores", fix="leave one of them out")
    if dry_run:
        raise UsageError(
            "--mode cascade cannot say what it will cost",
            why="how many images are measured is known once all are estimated",
            fix="--dry-run with --mode fast, and with --mode refined: it lies between the first and their sum",
        )
    if several:
        raise UsageError(
            "--mode cascade works in one process",
            why="which images are measured is known once all are estimated",
            fix="leave out --worker, --devices, --engine ray and launchers, or share out --mode refined",
        )


def _cascade(norm: str | None, threat: str | None, prune_fraction: float | None, c: float | None) -> Cascade:
    """The plan that a cascade measures for."""
    from puma.scoring.cascade import Cascade
    from puma.threat import ThreatModel, parse_norm

    if threat is None:
        raise UsageError("--mode cascade needs the plan it measures for", fix="--threat Linf:8/255")
    share = 0.3 if prune_fraction is None else prune_fraction
    plan = Cascade(ThreatModel.parse(threat), share, 0.5 if c is None else c)
    if norm is not None and parse_norm(norm) != plan.threat.norm:
        raise UsageError(
            f"--norm {norm} contradicts --threat {plan.threat}",
            why="a cascade measures in the norm of its threat model",
            fix="leave out --norm",
        )
    return plan


def _on_ray(
    job: ScoringJob, norm: str, mode: str, sizes: Sizes, out: Path, address: str | None, quiet: bool
) -> MarginTable:
    from puma.scoring.ray_engine import score_on_ray
    from puma.scoring.settings import sized

    device = _device_type(job.device)
    settings = sized(norm, mode, device, **sizes)
    return score_on_ray(job, settings, out, address=address, gpus=device == "cuda", progress=not quiet)


def _estimated(job: ScoringJob, norm: str, mode: str, sizes: Sizes, out: Path, workers: int) -> Estimate:
    from puma.scoring.estimate import estimate
    from puma.scoring.health import check_model
    from puma.scoring.settings import sized

    settings = sized(norm, mode, _device_type(job.device), **sizes)
    model, pool = job.open()
    check_model(model, pool)
    return estimate(model, pool, settings, settings.meta(model, pool), out, workers)


def _device_type(device: str) -> str:
    from puma.scoring.job import resolve_device

    return resolve_device(device).type


def _print_table(table: MarginTable | None, out: Path) -> None:
    import numpy as np

    from puma.margins import Status

    if table is None:
        typer.echo(f"this worker's parts are in {out}; others are still missing")
        return
    typer.echo(f"{len(table):,} margins ({table.norm}, {table.meta['mode']}) in {out}")
    if (measured := table.meta["settings"].get("measured")) is not None:
        share = measured / len(table)
        typer.echo(f"  stages: {len(table):,} estimated (fast), {measured:,} of them measured (refined), {share:.2%}")
    for status in Status:
        if count := int((table.status == status).sum()):
            typer.echo(f"  {status.text:14} {count:12,}  {count / len(table):7.2%}")
    finite = table.margin[np.isfinite(table.margin) & (table.margin > 0)]
    if len(finite):
        low, middle, high = np.quantile(finite, [0.1, 0.5, 0.9])
        typer.echo(f"  positive margins: 10 % below {low:.4g}, median {middle:.4g}, 10 % above {high:.4g}")


def _print_estimate(cost: Estimate) -> None:
    hours, rest = divmod(round(cost.seconds), 3600)
    free = "" if cost.disk_free is None else f" of {cost.disk_free / 1e9:,.1f} GB free"
    typer.echo(
        f"images   {cost.images:,} to score, {cost.finished:,} finished\n"
        f"speed    {cost.images_per_s:,.1f} images/s a worker (measured on {cost.probed:,})\n"
        f"time     {hours} h {rest // 60} min {rest % 60} s\n"
        f"memory   {'' if cost.whole_batch else 'at least '}{cost.memory_bytes / 1e9:,.2f} GB a worker\n"
        f"disk     {cost.disk_bytes / 1e6:,.1f} MB{free}"
    )
