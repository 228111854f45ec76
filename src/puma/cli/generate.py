"""``puma generate``: labelled synthetic images for a pool."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import puma
from puma.cli.options import Config, Device, DryRun, Quiet, Seed
from puma.cli.output import duration, echo, print_table
from puma.devices import resolve_device
from puma.errors import UsageError
from puma.io import write_json

if TYPE_CHECKING:
    from puma.data.source import Source
    from puma.generation.sampling import Sampler

_SAMPLER = "sampler."
_SETTINGS = "steps=2000, width=96, sampler.steps=40, sampler.batch_size=64 ...; with --diffusers: of its call."
_EVAL_DATA = "Measure the quality against these real test images."
_DIFFUSERS = "Sample from this diffusers pipeline (folder or hub name)."
_CLASS_IDS = "With --diffusers: its ids of these classes, 281,207,..."
_PROMPT = "With --diffusers by text: {name} is the class."


def generate(
    out: Annotated[Path, Option("--out", help="Target: NAME.npz (EDM layout).")],
    count: Annotated[int, Option("--count", min=1, help="How many images to sample.")],
    source: Annotated[str | None, Argument(help="Real images to train on: digits, an .npz, Parquet ...")] = None,
    settings: Annotated[list[str] | None, Option("--set", metavar="NAME=VALUE", help=_SETTINGS)] = None,
    eval_data: Annotated[str | None, Option(metavar="TEST", help=_EVAL_DATA)] = None,
    model: Annotated[Path | None, Option(help="Sample from this NAME.diffusion folder; nothing is trained.")] = None,
    diffusers: Annotated[str | None, Option(metavar="NAME", help=_DIFFUSERS)] = None,
    classes: Annotated[str | None, Option(help="With --diffusers: class names, cat,dog,...")] = None,
    class_ids: Annotated[str | None, Option(help=_CLASS_IDS)] = None,
    prompt: Annotated[str, Option(help=_PROMPT)] = "a photo of a {name}",
    size: Annotated[int | None, Option(min=8, help="With --diffusers: shrink images to this side.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    config: Config = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> None:
    """Make labelled synthetic images: train a small diffusion model on SOURCE, then sample from it.

    The label of an image is the class it was sampled for. Interrupted or killed, the same command resumes; with a
    larger --count the trained model is used again. It stays in NAME.diffusion beside the images.

    --eval-data measures how good they are: whether a classifier trained on SOURCE agrees with the labels, how well one
    trained on them does on real images, whether they copy the training images, and how varied they are.

    Example: puma generate digits --count 10000 --out synthetic.npz --eval-data digits:test
    """
    from puma.generation import Diffusion, SamplerConfig, diffusion_config, generate_from
    from puma.generation import generate as train_and_sample
    from puma.generation.networks import validated
    from puma.generation.quality import check_comparable
    from puma.generation.sampling import diffusion_sampler, estimate_cost, sampling_seconds
    from puma.training.recipe import parse_changes

    _check_origin(source, model, diffusers, eval_data)
    given = parse_changes(settings or [])
    sampling = {name.removeprefix(_SAMPLER): given[name] for name in given if name.startswith(_SAMPLER)}
    changes = {name: given[name] for name in given if not name.startswith(_SAMPLER)}
    if changes and model is not None:
        raise UsageError("--set trains a model; there is one already", fix="--set sampler.NAME=VALUE")
    sampler_config = validated(SamplerConfig, sampling)
    on = resolve_device(device)
    real = None if source is None else puma.load_dataset(source)
    test = None if eval_data is None else puma.load_dataset(eval_data)
    if real is not None and test is not None:
        check_comparable(real, test)
    if model is not None or diffusers is not None:
        generator: Diffusion | Sampler
        if model is not None:
            generator = Diffusion.load(model).to(on)
        else:
            options = {"seed": seed, "prompt": prompt, "size": size, "options": changes}
            generator = _pipeline(str(diffusers), on, classes, class_ids, **options)
        if dry_run:
            if isinstance(generator, Diffusion):
                generator = diffusion_sampler(generator, seed, sampler_config)
            seconds = sampling_seconds(generator, count, sampler_config.batch_size)
            return _echo_cost(count, seconds, math.prod(generator.image_shape))
        generate_from(generator, count, out=out, config=sampler_config, seed=seed, progress=not quiet)
    elif real is not None:
        diffusion = diffusion_config(real.image_shape, **changes)
        if dry_run:
            parameters, training, sampling_time = estimate_cost(real, count, diffusion, sampler_config, on)
            steps = f"{diffusion.steps:,} steps of {diffusion.batch_size}, {parameters:,} parameters"
            echo(f"training  {steps}: about {duration(training)} on {on}")
            return _echo_cost(count, sampling_time, math.prod(real.image_shape))
        train_and_sample(
            real, count, out=out, config=diffusion, sampler=sampler_config, seed=seed, device=on, progress=not quiet
        )
    echo(f"{count:,} images in {out}\nhow they were made is in {out.with_suffix('.diffusion')}")
    if real is not None and test is not None:
        _measure(real, test, out)


def _echo_cost(count: int, seconds: float, image_bytes: int) -> None:
    echo(f"sampling  {count:,} images: about {duration(seconds)}, {count * image_bytes / 1e6:,.1f} MB")


def _check_origin(source: str | None, model: Path | None, diffusers: str | None, eval_data: str | None) -> None:
    trained = model is not None or diffusers is not None
    unused = f"{source} would not be used: --model and --diffusers train nothing"
    for wrong, what, fix in (
        (model and diffusers, "--model and --diffusers are two generators", "give one of them"),
        (not source and not trained, "there is nothing to sample from", "puma generate digits --count 9 --out x.npz"),
        (not source and eval_data, "--eval-data compares with the training images too", "give SOURCE"),
        (source and trained and not eval_data, unused, "leave it out, or add --eval-data TEST, which it would serve"),
    ):
        if wrong:
            raise UsageError(what, fix=fix)


def _pipeline(name: str, device: Any, classes: str | None, class_ids: str | None, **options: Any) -> Sampler:
    from puma.generation.sampling import load_pipeline, pipeline_sampler

    if classes is None:
        raise UsageError("--diffusers needs the class names", fix="--classes cat,dog")
    try:
        ids = None if class_ids is None else [int(number) for number in class_ids.split(",")]
    except ValueError:
        raise UsageError(f"--class-ids {class_ids} are not numbers", fix="--class-ids 281,207") from None
    return pipeline_sampler(load_pipeline(name, device), classes.split(","), class_ids=ids, **options)


def _measure(real: Source, test: Source, out: Path) -> None:
    from puma.generation.quality import measure

    quality, target = measure(real, test, puma.load_dataset(out)), out.with_suffix(".quality.json")
    write_json(target, quality)
    near, accuracy = quality["neighbor"], quality["real_accuracy"]
    distances = (near[f"{role}_to_train"]["mean"] for role in ("synthetic", "test"))
    rows = (
        ("label agreement of a classifier trained on real images", quality["label_agreement"], accuracy),
        ("accuracy on real test images of one trained on these", quality["synthetic_trained_accuracy"], accuracy),
        ("mean distance to the nearest training image", *distances),
        ("nearer to one than 99 % of test images", near["copies"], 0.01),
    )
    cells = [(words, *(f"{value:.4f}" for value in values)) for words, *values in rows]
    print_table(("", "synthetic", "real test"), cells)
    echo(f"features: {quality['features']}; coverage by class, and all figures: {target}")
