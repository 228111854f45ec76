"""``puma score`` and ``puma score-run``: margins of a pool, and scores over the snapshots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from puma.cli import options
from puma.cli.options import Address, Config, Device, Devices, DryRun, Engine, NumWorkers, Quiet, Worker
from puma.cli.output import duration, echo
from puma.devices import resolve_device
from puma.errors import UsageError
from puma.threat import ThreatModel, format_eps, parse_eps, parse_norm

if TYPE_CHECKING:
    from puma.scoring.job import Estimate, ScoringJob

_MODEL = "weights file, run folder, robustbench:NAME, timm:NAME, torchvision:NAME, hf:REPO, or package.module:factory"
MarginModel = Annotated[str, Argument(help=f"Margin model: {_MODEL}.")]
Sources = Annotated[list[str], Argument(help="The pool: data sources, real ones first.", show_default=False)]
Roles = Annotated[str | None, Option(help="real,synthetic,... one for each source.")]
Weights = Annotated[Path | None, Option(help="Safetensors or a run folder; of published models .pt too.")]
BatchSize = Annotated[int | None, Option(min=1, help="Images computed together.")]
PartRows = Annotated[int, Option(min=1, help="Rows of one part file.")]
Out = Annotated[Path, Option("--out", help="Folder of the table; parts that are finished there are kept.")]

_NORM = Option(help='"Linf" or "L2", that of the training to come.', show_default="Linf, or that of --threat")
_THREAT = "Threat model of the training to come, as Linf:8/255: --refine-below twice its eps."
_REFINE = "Estimate every margin, search only where the estimate is below this, as 16/255."
_REFINE_DEFAULT = "twice eps with --threat, else every image is searched"
_MODES = options.completion("fast", "deepfool", "refined", "tight")


def score(
    model: MarginModel,
    sources: Sources,
    out: Out,
    norm: Annotated[str | None, _NORM] = None,
    threat: Annotated[ThreatModel | None, Option(parser=options.parse_threat, metavar="NORM:EPS", help=_THREAT)] = None,
    mode: Annotated[str, Option(help="fast (estimates), deepfool, refined, tight.", autocompletion=_MODES)] = "refined",
    refine_below: Annotated[str | None, Option(help=_REFINE, show_default=_REFINE_DEFAULT)] = None,
    weights: Weights = None,
    roles: Roles = None,
    batch_size: BatchSize = None,
    part_rows: PartRows = 65_536,
    precision: Annotated[str, Option(help="Of gradients: float32 or bf16; crossings in float32.")] = "float32",
    compile: Annotated[bool, Option("--compile", help="Search with torch.compile's model.")] = False,
    device: Device = "auto",
    worker: Worker = None,
    num_workers: NumWorkers = None,
    devices: Devices = 1,
    engine: Engine = "local",
    address: Address = None,
    dry_run: DryRun = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Measure how far every image of a pool lies from the margin model's decision boundary (DeepFool).

    Positive margins: the model is right, higher is easier. Negative: it is wrong, and so far away is its label.
    With --threat, images whose estimated margin is at least twice its eps keep the estimate (status estimated).
    Interrupted or killed, the same command goes on. Several processes may share one --out: give each --worker i
    --num-workers n, or start them with torchrun or srun, or use --devices n on one machine, or --engine ray.
    """
    from puma.scoring.job import ScoringJob
    from puma.scoring.score import ScoringSettings

    share = options.share_of(device, devices, worker, num_workers, engine, address)
    if threat is not None and norm is not None and parse_norm(norm) != threat.norm:
        raise UsageError(f"--norm {norm} contradicts --threat {threat}", fix="leave out --norm")
    limit = None if refine_below is None else parse_eps(refine_below)
    if limit is None and threat is not None and mode != "fast":
        limit = 2 * threat.eps
    chosen = threat.norm if threat else parse_norm(norm or "Linf")
    sizes: dict[str, Any] = {"batch_size": batch_size, "part_rows": part_rows}
    search: dict[str, Any] = {"norm": chosen, "mode": mode, "refine_below": limit, "precision": precision}
    settings = ScoringSettings.sized(resolve_device(share.device), **search, **sizes, compile=compile)
    file, parts = None if weights is None else str(weights), None if roles is None else tuple(roles.split(","))
    job = ScoringJob(model, tuple(sources), str(out.absolute()), settings, file, parts, share.device)
    _make(job, share, out, dry_run, quiet)


def score_run(
    run: Annotated[Path, Argument(help="Folder of a run that kept snapshots.")],
    sources: Sources,
    out: Out,
    rows: Annotated[str, Option(help="all, or real (synthetic rows to be extrapolated).")] = "all",
    features: Annotated[Path | None, Option(help="Folder for feature vectors of the last snapshot.")] = None,
    roles: Roles = None,
    batch_size: BatchSize = None,
    part_rows: PartRows = 65_536,
    device: Device = "auto",
    worker: Worker = None,
    num_workers: NumWorkers = None,
    devices: Devices = 1,
    dry_run: DryRun = False,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Score every image of a pool over the snapshots that a run kept because its recipe says snapshots = K.

    Four scores, for strategies that need a training run: el2n-adv, robust-failure, dynamic-uncertainty, input-gradient.
    Interrupted or killed, the same command goes on; processes share one --out as in puma score.

    Example: puma score-run runs/all digits synthetic.npz --out scores --features features
    """
    from puma.scoring.job import ScoringJob, open_pool
    from puma.scoring.snapshots import SnapshotSettings, embed, load_snapshots, threat_of

    share = options.share_of(device, devices, worker, num_workers)
    where = resolve_device(share.device)
    size = batch_size or (1024 if where.type == "cuda" else 256)
    settings = SnapshotSettings(threat_of(run), rows=rows, batch_size=size, part_rows=part_rows)  # type: ignore[arg-type]  # rows is checked there
    chosen, folders = None if roles is None else tuple(roles.split(",")), (str(run.absolute()), str(out.absolute()))
    job = ScoringJob(folders[0], tuple(sources), folders[1], settings, None, chosen, share.device)
    if _make(job, share, out, dry_run, quiet):
        echo("give it to puma plan as another --table")
    if features is not None and share.worker == 0 and not dry_run:
        model = load_snapshots(run)[-1].to(where)
        embed(model, open_pool(job.sources, chosen), features, part_rows=part_rows, progress=not quiet)
        echo(f"feature vectors in {features}; give them to puma plan as --param features={features}")


def _make(job: ScoringJob, share: options.Share, out: Path, dry_run: bool, quiet: bool) -> bool:
    """Make a table and say what is in it, or what it costs; whether it is finished: others may miss their parts."""
    from puma.scoring.job import estimate

    if dry_run:
        print_estimate(estimate(*job.load(), job.settings, out, max(share.workers.count, share.num_workers)))
        return False
    table = job.make(share.worker, share.num_workers, share.workers, progress=not quiet)
    if table is None:
        echo(f"this worker's parts are in {job.out}; others are still missing")
        return False
    echo(f"{len(table):,} images scored ({table.norm}, {table.meta['mode']}) in {out}")
    rows = [(status, f"{count:>12,}{count / len(table):>9.2%}") for status, count in table.counts().items()]
    for name, figures in [(name, "") for name in sorted(table.scores)] or rows:
        echo(f"  {name:<16}{figures}".rstrip())
    if (limit := table.meta["settings"].get("refine_below")) is not None:
        below = format_eps(limit, table.norm)
        echo(f"  searched only where a first-order estimate was below {below}; the others are estimates")
    return True


def print_estimate(cost: Estimate) -> None:
    """Print what a table costs, a line for each of the things that may run out."""
    free = "" if cost.disk_free is None else f" of {cost.disk_free / 1e9:,.1f} GB free"
    echo(
        f"images   {cost.images:,} to score, {cost.finished:,} finished\n"
        f"speed    {cost.images_per_s:,.1f} images/s a worker (measured on {cost.measured:,})\n"
        f"time     {duration(cost.seconds)}\n"
        f"memory   {'' if cost.full_batch else 'at least '}{cost.memory_bytes / 1e9:,.2f} GB a worker\n"
        f"disk     {cost.disk_bytes / 1e6:,.1f} MB{free}"
    )
