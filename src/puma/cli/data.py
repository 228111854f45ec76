"""``puma data``: look at images and labels before training on them, unpack archives, and find wrong labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import puma
from puma.cli.options import Device, DryRun, Quiet
from puma.cli.output import echo, print_facts
from puma.cli.score import MarginModel, PartRows, Roles, Sources, Weights, print_estimate
from puma.devices import resolve_device
from puma.errors import UsageError
from puma.io import prepare_folder, read_json

if TYPE_CHECKING:
    from puma.data.source import Source

data_app = typer.Typer(help="Look at images and labels before training on them; unpack archives.", no_args_is_help=True)

_SPEC = "digits, cifar10, FILE.npz, FILE.parquet, FOLDER, hf:NAME:SPLIT, also with options: FILE?resize=16&subset=5000"
_TEST = "Test set: its images must not be in the others."
_UNPACKED = "File to write; default FILE-unpacked.npz beside it."


@data_app.command()
def show(
    sources: Annotated[list[str], Argument(metavar="SOURCE...", help=f"One or several: {_SPEC}.")],
    test: Annotated[str | None, Option(metavar="SOURCE", help=_TEST)] = None,
    duplicates: Annotated[bool, Option(help="Search for equal images: reads everything once.")] = True,
    quiet: Quiet = False,
) -> None:
    """Counts per class, label runs and duplicates of sources.

    Files of generated images are usually sorted by class, sometimes by confidence too: their first rows are no sample.
    Equal images are searched inside each source, between sources, and in the test set.
    """
    opened = [puma.load_dataset(spec) for spec in sources]
    against = puma.load_dataset(test) if test is not None else None
    for source in opened:
        _print_summary(source)
    if duplicates:
        _print_duplicates(opened, against, progress=not quiet)


@data_app.command()
def unpack(
    source: Annotated[Path, Argument(metavar="FILE", help="A compressed .npz.")],
    out: Annotated[Path | None, Option(help=_UNPACKED)] = None,
    quiet: Quiet = False,
) -> None:
    """Write a compressed .npz uncompressed, so that it is read in place.

    Its members are copied byte for byte, so tables and plans made from it stay valid.
    """
    from puma.data.npz import unpack_npz

    out = out or source.with_name(f"{source.stem}-unpacked.npz")
    if out.suffix != ".npz":
        raise UsageError(f"--out {out} has to end in .npz")
    prepare_folder(out.parent)
    unpack_npz(source, out, progress=not quiet)
    echo(f"written  {out} ({out.stat().st_size / 1e6:,.1f} MB)")


def _print_summary(source: Source) -> None:
    import numpy as np

    from puma.data.checks import label_runs

    numbers, (longest, expected) = np.bincount(source.labels), label_runs(source.labels)
    height, width, channels = source.image_shape
    counts = ", ".join(f"{name}: {count:,}" for name, count in zip(source.class_names[:20], numbers, strict=False))
    more = f" and {source.num_classes - 20} more classes" if source.num_classes > 20 else ""
    ordered = source.num_classes > 1 and longest > 4 * expected + 8
    order = "sorted, so its first rows are no sample (?subset= is)" if ordered else "mixed"
    rows = {
        "spec": source.spec or "none: made from a Python object",
        "images": f"{len(source):,} of {width}x{height}, {('grey', 'RGB')[channels == 3]}",
        "classes": f"{counts}{more} (smallest {numbers.min():,}, largest {numbers.max():,})",
        "label runs": f"longest {longest:,} (shuffled: about {expected:.0f}): {order}",
    }
    echo(repr(source)[1:-1])
    print_facts(rows | {"fingerprint": source.fingerprint})


def _print_duplicates(sources: list[Source], test: Source | None, *, progress: bool) -> None:
    from puma.data.checks import equal_images, image_hashes

    opened = sources if test is None else [*sources, test]
    hashes = [image_hashes(source, progress=progress) for source in opened]
    for number, source in enumerate(sources):
        for other in (number, *range(number), *range(len(sources), len(opened))):
            there = opened[other]
            if source.image_shape != there.image_shape:
                echo(f"{source.name} and {there.name} are not compared: their images are of different shape")
                continue
            rows, twins = equal_images(hashes[number], hashes[other] if other != number else None)
            name = f"the test set {there.name}" if other == len(sources) else there.name
            where = "occur earlier in it" if other == number else f"occur in {name}"
            text = f"{len(rows):,} of {len(source):,} images of {source.name} {where}"
            if len(rows):
                pairs = ", ".join(f"{row:,} = {twin:,}" for row, twin in zip(rows[:3], twins[:3], strict=True))
                conflicts = int((source.labels[rows] != there.labels[twins]).sum())
                text = f"{text}, {conflicts:,} with another label (rows {pairs} ...)"
            echo(f"duplicates  {text}")


@data_app.command()
def labels(
    model: MarginModel,
    sources: Sources,
    out: Annotated[Path, Option("--out", help="Folder of the score table; what is finished there is kept.")],
    weights: Weights = None,
    roles: Roles = None,
    batch_size: Annotated[int, Option(min=1, help="Images per forward pass.")] = 512,
    part_rows: PartRows = 65_536,
    device: Device = "auto",
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Estimate which labels of a pool are wrong: one forward pass, two columns beside the margins.

    label_quality, 0 to 1: below 0.5 the model gives another class. label_issue: 1 where the label is probably wrong
    (cleanlab, extra "labels"). The model should not have been trained on these labels.
    Interrupted or killed, the same command goes on.

    Example: puma data labels model.safetensors digits synthetic.npz --out label-quality
    """
    from puma.margins import LABEL_ISSUE, LABEL_QUALITY
    from puma.models.zoo import resolve_model
    from puma.scoring.job import estimate, open_pool
    from puma.scoring.labels import LabelSettings, require_cleanlab, score_labels
    from puma.scoring.parts import checked_pool

    require_cleanlab()
    pool = open_pool(tuple(sources), None if roles is None else tuple(roles.split(",")))
    network = resolve_model(model, None if weights is None else str(weights)).eval().to(resolve_device(device))
    record = Path(weights or model) / "run.json"
    if record.is_file() and read_json(record).get("settings", {}).get("pool") == pool.fingerprint:
        echo("note: this model was trained on these very labels and has memorized some wrong ones: fewer are flagged")
    if dry_run:
        pool = checked_pool(network, pool)
        cost = estimate([network], pool, LabelSettings(batch_size, part_rows), out)
        return print_estimate(replace(cost, disk_bytes=cost.disk_bytes + 4 * pool.num_classes * cost.images))
    table = score_labels(network, pool, out=out, batch_size=batch_size, part_rows=part_rows, progress=not quiet)
    agrees, flagged = table.scores[LABEL_QUALITY] > 0.5, table.scores[LABEL_ISSUE] == 1
    for code, source in enumerate(table.sources):
        mine, issues = table.source == code, int(flagged[table.source == code].sum())
        agreed = f"the model agrees with {agrees[mine].mean():.2%} of the labels"
        wrong = f"{issues:,} are probably wrong ({flagged[mine].mean():.2%})"
        echo(f"{source['name']} ({source['role']}, {source['rows']:,}): {agreed}; {wrong}")
    echo(f"written to {out}; it joins the margins: puma plan --table margins --table {out}")
