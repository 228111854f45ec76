"""``puma export``: a model to share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puma.errors import UsageError

if TYPE_CHECKING:
    from puma.export import Claim

export_app = typer.Typer(
    help="Make a folder to share: for RobustBench, or for the Hugging Face Hub. Offline; nothing is uploaded.",
    no_args_is_help=True,
)

Model = Annotated[Path, typer.Argument(help="Run folder, or a weights file that PUMA wrote.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to make; it must not hold anything.")]
Evaluated = Annotated[
    Path | None, typer.Option("--evaluation", help="evaluation.json of this model; default: that of the run folder.")
]
Checkpoint = Annotated[str, typer.Option(help="Of a run folder: last or best.")]
Title = Annotated[str, typer.Option("--title", help="Title of the paper, or of the model.")]
Authors = Annotated[str, typer.Option(help="Comma-separated.")]
Link = Annotated[str, typer.Option(help="Of the paper or the code.")]
Venue = Annotated[str, typer.Option(help="Where it appeared.")]
Footnote = Annotated[str | None, typer.Option(help='Such as "It uses 1M synthetic images."')]
Licence = Annotated[str, typer.Option("--licence", "--license", help="Of the weights, an SPDX name.")]

_LINK = "https://arxiv.org/abs/2405.06298"


@export_app.command("robustbench")
def robustbench(
    model: Model,
    out: Out,
    name: Annotated[str, typer.Option("--name", help="The model's id: <Author><Year><FirstWord>_<architecture>.")],
    title: Title,
    evaluation: Evaluated = None,
    checkpoint: Checkpoint = "last",
    dataset: Annotated[str, typer.Option(help="RobustBench's name of the data set.")] = "cifar10",
    authors: Authors = "Unknown",
    link: Link = _LINK,
    venue: Venue = "Unpublished",
    footnote: Footnote = None,
    additional_data: Annotated[
        bool, typer.Option("--additional-data", help="Real images beyond the data set's own were used.")
    ] = False,
    licence: Licence = "mit",
) -> None:
    """Make a RobustBench submission: weights with its keys, model_info JSON, model card, text of the issue.

    The model has to be a WRN or PreActResNet for 32 pixels, judged by AutoAttack standard on the whole test set
    (`puma evaluate`). A fresh process loads the folder without PUMA and has to give the same logits to 1e-6.

      puma export robustbench runs/puma-30 --out share --name Me2026Pruning_WRN-28-10 --title "Pruning for robustness"
    """
    from puma.export import Paper, export_robustbench
    from puma.export.robustbench import is_listed
    from puma.models.weights import load_model

    claim = _claim(model, checkpoint, evaluation)
    if claim is None:
        raise UsageError(f"{model} has not been evaluated", fix=f"puma evaluate {model} --data ... --threat ...")
    paper = Paper(title, authors, link, venue, additional_data, footnote, licence)
    folder = export_robustbench(
        load_model(_weights(model, checkpoint)),
        out,
        name=name,
        claim=claim,
        paper=paper,
        dataset=dataset,
        run=_run(model),
    )
    typer.echo(f"{folder} loads by itself and gives the same logits")
    if not is_listed(claim, dataset):
        typer.echo(f"note: RobustBench has no table for {dataset} at {claim.threat} that we know of")
    typer.echo(f"next     open an issue at RobustBench with the text of {folder / 'new_model_issue.md'}")


@export_app.command("hub")
def hub(
    model: Model,
    out: Out,
    title: Title,
    evaluation: Evaluated = None,
    checkpoint: Checkpoint = "last",
    dataset: Annotated[str, typer.Option(help="What it was trained for, as the Hub names it.")] = "unknown",
    authors: Authors = "Unknown",
    link: Link = _LINK,
    venue: Venue = "Unpublished",
    footnote: Footnote = None,
    licence: Licence = "apache-2.0",
) -> None:
    """Make a Hugging Face Hub folder: model.safetensors, config.json, model.py and a model card.

    A model that was not evaluated claims nothing. A fresh process loads the folder without PUMA and has to give the
    same logits to 1e-6.

      puma export hub runs/puma-30 --out share --title "PUMA on digits" --dataset digits
    """
    from puma.export import Paper, export_hub
    from puma.models.weights import load_model

    paper = Paper(title, authors, link, venue, footnote=footnote, licence=licence)
    folder = export_hub(
        load_model(_weights(model, checkpoint)),
        out,
        paper=paper,
        dataset=dataset,
        claim=_claim(model, checkpoint, evaluation),
        run=_run(model),
    )
    typer.echo(f"{folder} loads by itself and gives the same logits")
    typer.echo(f"next     hf upload YOUR/NAME {folder}")


def _weights(model: Path, checkpoint: str) -> Path:
    if checkpoint not in ("last", "best"):
        raise UsageError(f"unknown checkpoint {checkpoint!r}", fix="last or best")
    return model / f"{checkpoint}.safetensors" if model.is_dir() else model


def _run(model: Path) -> Path:
    return model if model.is_dir() else model.parent


def _claim(model: Path, checkpoint: str, evaluation: Path | None) -> Claim | None:
    from puma.export import Claim

    if evaluation is not None:
        return Claim.read(evaluation)
    found = (_run(model) / "best" if checkpoint == "best" else _run(model)) / "evaluation.json"
    return Claim.read(found) if model.is_dir() and found.is_file() else None
