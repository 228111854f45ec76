"""``puma generate``: labelled synthetic images for a pool."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from puma.cli.options import Config, Quiet, Seed
from puma.errors import UsageError

if TYPE_CHECKING:
    import torch

    from puma.data.source import Source
    from puma.generation import DiffusionConfig, SamplerConfig
    from puma.generation.drawing import Drawer

_SAMPLER = "sampler."


def generate(
    out: Annotated[Path, typer.Option("--out", help="Target: NAME.npz (EDM layout) or NAME.parquet.")],
    count: Annotated[int, typer.Option("--count", min=1, help="How many images to draw.")],
    source: Annotated[
        str | None, typer.Argument(help="Real images to learn from: digits, an .npz, Parquet ...")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="digits (8-16 pixels) or small-32; none: by size.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="steps=2000, width=96, sampler.steps=40 ...; with --diffusers: of its call.",
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(min=0, help="Above 1 exaggerates the label (needs label_dropout).")] = 1.0,
    churn: Annotated[float, typer.Option(min=0, help="Fresh noise while sampling (S_churn); 0: deterministic.")] = 0.0,
    labels: Annotated[str, typer.Option(help="balanced, or real: the class shares of SOURCE.")] = "balanced",
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn together.")] = 512,
    part_rows: Annotated[int, typer.Option(min=1, help="Images per part: what an interruption can cost.")] = 2048,
    judge: Annotated[
        str | None, typer.Option(metavar="TEST", help="Measure the quality against these real test images.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Draw from this NAME.diffusion folder; nothing is trained.")
    ] = None,
    diffusers: Annotated[str | None, typer.Option(metavar="PLACE", help="Draw from this diffusers pipeline.")] = None,
    classes: Annotated[str | None, typer.Option(help="With --diffusers: class names, cat,dog,...")] = None,
    class_ids: Annotated[
        str | None, typer.Option(help="With --diffusers: its ids of these classes, 281,207,...")
    ] = None,
    prompt: Annotated[str, typer.Option(help="With --diffusers by text: {name} is the class.")] = "a photo of a {name}",
    size: Annotated[int | None, typer.Option(min=8, help="With --diffusers: shrink images to this side.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Processor threads; 0 leaves it to torch.")] = 0,
    seed: Seed = 0,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Make labelled synthetic images: train a small diffusion model on SOURCE, then draw from it.

    The label of an image is the class it was drawn for. Interrupted or killed, the same command goes on; with a larger
    --count the trained model is used again. It stays in NAME.diffusion beside the images.

    --judge says how good they are: whether a classifier trained on SOURCE agrees with the labels, how well one trained
    on them does on real images, whether they copy the training images, and how varied they are.

    Example: puma generate digits --count 10000 --out synthetic.npz --judge digits:test
    """
    import torch

    from puma.generation.synthesis import generate as generate_images
    from puma.generation.synthesis import generate_from
    from puma.scoring.job import resolve_device

    _check_origin(source, model, diffusers, judge)
    where = resolve_device(device)
    if threads:
        torch.set_num_threads(threads)
    changes, sampling = _parsed(settings or [])
    sampler = _sampler(
        {"guidance": guidance, "churn": churn, "labels": labels, "batch_size": batch_size, "part_rows": part_rows},
        sampling,
    )
    real, test = _opened(source, judge)
    if model is not None or diffusers is not None:
        if preset or (changes and model is not None):
            raise UsageError("--preset and --set train a model; there is one already", fix="--set sampler.NAME=VALUE")
        drawer = (
            _trained(model, where, seed, sampler)
            if model is not None
            else _pipeline(str(diffusers), where, seed, classes, class_ids, prompt, size, changes)
        )
        generate_from(drawer, count, out=out, sampler=sampler, progress=not quiet)
    else:
        generate_images(
            _given(real),
            count,
            out=out,
            config=_diffusion(_given(real), preset, changes),
            sampler=sampler,
            seed=seed,
            device=where,
            progress=not quiet,
        )
    folder = out.with_suffix(".diffusion")
    typer.echo(f"{count:,} images in {out}\nhow they were made is in {folder}")
    if real is not None and test is not None:
        _judge(real, test, out)


def _check_origin(source: str | None, model: Path | None, diffusers: str | None, judge: str | None) -> None:
    if model is not None and diffusers is not None:
        raise UsageError("--model and --diffusers are two generators", fix="give one of them")
    if source is None and model is None and diffusers is None:
        raise UsageError("there is nothing to draw from", fix="puma generate digits --count 10000 --out synthetic.npz")
    if judge is not None and source is None:
        raise UsageError("--judge compares with the training images too", fix="give their SOURCE as the argument")
    if source is not None and judge is None and (model is not None or diffusers is not None):
        raise UsageError(
            f"{source} would not be used",
            why="--model and --diffusers train nothing; SOURCE then only serves --judge",
            fix="leave it out, or add --judge TEST",
        )


def _parsed(settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the diffusion model, and those of the sampler (``sampler.NAME=VALUE``)."""
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text} has no value", fix=f"--set {text}=VALUE")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
        found[name.startswith(_SAMPLER)][name.removeprefix(_SAMPLER)] = parsed
    return found


def _sampler(flags: dict[str, Any], settings: dict[str, Any]) -> SamplerConfig:
    from puma.generation.config import SamplerConfig, checked

    return checked(SamplerConfig, flags | settings)


def _diffusion(real: Source, name: str | None, changes: dict[str, Any]) -> DiffusionConfig:
    from puma.generation.config import DiffusionConfig, checked, preset
    from puma.generation.synthesis import preset_for

    if name is not None:
        return preset(name, **changes)
    return checked(DiffusionConfig, preset_for(real.image_shape).model_dump() | changes)


def _opened(source: str | None, judge: str | None) -> tuple[Source | None, Source | None]:
    from puma.data.load import load_dataset
    from puma.generation.quality import check_comparable

    real = None if source is None else load_dataset(source)
    test = None if judge is None else load_dataset(judge)
    if real is not None and test is not None:
        check_comparable(real, test)
    return real, test


def _given(real: Source | None) -> Source:
    if real is None:
        raise UsageError("SOURCE is missing")
    return real


def _trained(folder: Path, device: torch.device, seed: int, sampler: SamplerConfig) -> Drawer:
    from puma.generation import Diffusion
    from puma.generation.sampling import DiffusionDrawer

    return DiffusionDrawer(Diffusion.load(folder).to(device), seed, sampler)


def _pipeline(
    place: str,
    device: torch.device,
    seed: int,
    classes: str | None,
    class_ids: str | None,
    prompt: str,
    size: int | None,
    options: dict[str, Any],
) -> Drawer:
    from puma.generation.pipelines import PipelineDrawer, load_pipeline

    if classes is None:
        raise UsageError("--diffusers needs the class names", fix="--classes cat,dog")
    try:
        ids = None if class_ids is None else [int(number) for number in class_ids.split(",")]
    except ValueError:
        raise UsageError(f"--class-ids {class_ids} are not numbers", fix="--class-ids 281,207") from None
    pipeline = load_pipeline(place, device)
    return PipelineDrawer(
        pipeline, classes.split(","), seed=seed, class_ids=ids, prompt=prompt, size=size, options=options
    )


def _judge(real: Source, test: Source, out: Path) -> None:
    from puma.data.load import load_dataset
    from puma.generation.quality import measure
    from puma.io import write_json

    found = measure(real, test, load_dataset(out))
    target = out.with_suffix(".quality.json")
    write_json(target, found)
    near, cover, frechet = found["neighbour"], found["coverage"], found["frechet"]
    used = {role: one["used"] for role, one in found["sources"].items()}
    spread = {role: [value for value in cover[role].values() if value is not None] for role in ("synthetic", "test")}
    least = {role: min(values, default=float("nan")) for role, values in spread.items()}
    typer.echo(
        f"judged on {used['synthetic']:,} synthetic, {used['train']:,} training, {used['test']:,} test images\n"
        f"                                             synthetic  real test\n"
        f"  labels, says a real-trained classifier     {found['label_agreement']:9.4f}  {found['real_accuracy']:9.4f}\n"
        f"  accuracy on real test after training on it {found['synthetic_trained_accuracy']:9.4f}"
        f"  {found['real_accuracy']:9.4f} (trained on real)\n"
        f"  mean distance to nearest training image    {near['synthetic_to_train']['mean']:9.4f}"
        f"  {near['test_to_train']['mean']:9.4f}\n"
        f"  nearer to one than 99 % of test images     {near['copies']:9.4f}     0.0100\n"
        f"  coverage, worst class                      {least['synthetic']:9.4f}  {least['test']:9.4f}\n"
        f"  {'Frechet distance, ' + format(frechet['rows']['other'], ',') + ' images':42} {frechet['synthetic']:9.4f}"
        f"  {frechet['test']:9.4f}\n"
        f"features: {found['features']}; all figures in {target}"
    )
