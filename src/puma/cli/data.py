"""``puma data``: look at images and labels before training on them, and unpack them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puma.cli.labels import drop_label_issues, labels
from puma.cli.options import Quiet
from puma.cli.output import echo, print_facts

if TYPE_CHECKING:
    from puma.data.source import Source

data_app = typer.Typer(help="Look at images and labels before training on them, and unpack them.", no_args_is_help=True)
data_app.command()(labels)
data_app.command("drop-label-issues")(drop_label_issues)

_SPEC = "digits, cifar10, FILE.npz, FILE.parquet, FOLDER, hf:NAME:SPLIT, also with options: FILE?resize=16&subset=5000"


@data_app.command()
def show(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=f"One or several: {_SPEC}.")],
    test: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Test set: its images must not be in the others.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw a contact sheet of each source (PNG).")] = None,
    per_class: Annotated[int, typer.Option(min=1, max=100, help="Images of each class on the sheet.")] = 10,
    verify: Annotated[str, typer.Option(help="full: read every byte and compare checksums.")] = "headers",
    duplicates: Annotated[bool, typer.Option(help="Search for equal images: reads everything once.")] = True,
    quiet: Quiet = False,
) -> None:
    """Counts per class, label runs, pixel statistics and duplicates of sources; a contact sheet.

    Files of generated images are usually sorted by class, sometimes by confidence too: their first rows are no sample.
    Equal images are searched inside each source, between sources, and in the test set.
    """
    from puma.data.checks import contact_sheet
    from puma.data.load import load_dataset
    from puma.io import prepare_folder, write_bytes

    if sheet is not None:
        prepare_folder(sheet.parent)
    options = {} if verify == "headers" else {"verify": verify}
    opened = [load_dataset(spec, **options) for spec in sources]
    against = load_dataset(test, **options) if test is not None else None
    for source in opened:
        _print_summary(source)
    if duplicates:
        _print_duplicates(opened, against, progress=not quiet)
    for number, source in enumerate(opened if sheet is not None else [], start=1):
        assert sheet is not None
        target = sheet if number == 1 else sheet.with_name(f"{sheet.stem}-{number}{sheet.suffix}")
        write_bytes(target, contact_sheet(source, per_class))
        echo(f"contact sheet of {source.name}: {target}")


@data_app.command()
def unpack(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"A compressed .npz, or any source: {_SPEC}.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default SOURCE-unpacked.npz beside it.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a source as an uncompressed .npz that is read in place: nothing to inflate or decode ever after.

    The members of a compressed .npz are copied byte for byte, so tables and plans made from it stay valid.
    """
    from puma.data.load import load_dataset
    from puma.data.npz import save_source, unpack_npz
    from puma.errors import UsageError
    from puma.io import prepare_folder

    path = Path(source)
    if out is None and not path.exists():
        raise UsageError(f"{source} is no file, so its target has to be named", fix="add --out images.npz")
    out = out or path.with_name(f"{path.stem}-unpacked.npz")
    if out.suffix != ".npz":
        raise UsageError(f"--out {out} has to end in .npz")
    prepare_folder(out.parent)
    if path.suffix == ".npz" and path.is_file():
        unpack_npz(path, out, progress=not quiet)
    else:
        save_source(load_dataset(source), out, progress=not quiet)
    echo(f"written  {out} ({out.stat().st_size / 1e6:,.1f} MB)")


def _print_summary(source: Source) -> None:
    from puma.data.checks import summarize

    facts = summarize(source)
    height, width, channels = source.image_shape
    counts = ", ".join(f"{name} {count:,}" for name, count in zip(source.class_names[:20], facts.counts, strict=False))
    more = f" and {source.num_classes - 20} more classes" if source.num_classes > 20 else ""
    order = "sorted, so its first rows are no sample (?subset= is)" if facts.ordered else "mixed"
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (facts.mean, facts.std))
    rows = {
        "spec": source.spec or "none: made from a Python object",
        "images": f"{len(source):,} of {width}x{height}, {('grey', 'RGB')[channels == 3]}",
        "classes": f"{counts}{more} (smallest {facts.counts.min():,}, largest {facts.counts.max():,})",
        "label runs": f"longest {facts.longest_run:,} (shuffled: about {facts.expected_run:.0f}): {order}",
        "pixels": f"mean {mean}, std {std}, {facts.low}..{facts.high} (of {facts.sampled:,} images)",
    }
    if facts.flat:
        rows["one colour"] = f"{facts.flat:,} of {facts.sampled:,} images"
    echo(repr(source)[1:-1])
    print_facts(rows | {"fingerprint": source.fingerprint})


def _print_duplicates(sources: list[Source], test: Source | None, *, progress: bool) -> None:
    from puma.data.checks import Duplicates, image_hashes, repeated, shared

    def show_pairs(equal: Duplicates, source: Source, where: str, other: Source) -> None:
        text = f"{len(equal):,} of {len(source):,} images of {source.name} {where}"
        if len(equal):
            pairs = ", ".join(f"{row:,} = {twin:,}" for row, twin in zip(equal.rows[:3], equal.twins[:3], strict=True))
            text = f"{text}, {equal.conflicts:,} with another label (rows {pairs} ...)"
        if source.image_shape != other.image_shape:
            text = f"{source.name} and {other.name} are not compared: their images are of different shape"
        echo(f"duplicates  {text}")

    hashes = [image_hashes(source, progress=progress) for source in sources]
    test_hashes = image_hashes(test, progress=progress) if test is not None else None
    for number, (source, own) in enumerate(zip(sources, hashes, strict=True)):
        show_pairs(repeated(source, own), source, "occur earlier in it", source)
        for other, theirs in zip(sources[:number], hashes, strict=False):
            show_pairs(shared(source, own, other, theirs), source, f"occur in {other.name}", other)
        if test is not None and test_hashes is not None:
            show_pairs(shared(source, own, test, test_hashes), source, f"occur in the test set {test.name}", test)
