"""``puma export``: a folder to share a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from puma.cli.output import echo
from puma.errors import UsageError


def export(
    layout: Annotated[Literal["hub", "robustbench"], typer.Argument(help="hub (Hugging Face) or robustbench.")],
    model: Annotated[Path, typer.Argument(help="Run folder, or a weights file that PUMA wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; it must be empty or absent.")],
    title: Annotated[str, typer.Option(help="Title of the paper, or of the model.")],
    name: Annotated[
        str | None, typer.Option(help="RobustBench: the model's id, <Author><Year><FirstWord>_<architecture>.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="evaluation.json of this model; default: that of the run folder.")
    ] = None,
    checkpoint: Annotated[Literal["last", "best"], typer.Option(help="Of a run folder.")] = "last",
    dataset: Annotated[str, typer.Option(help="The data set as the Hub or RobustBench names it.")] = "cifar10",
    authors: Annotated[str, typer.Option(help="Comma-separated.")] = "Unknown",
    link: Annotated[str, typer.Option(help="Of the paper or the code.")] = "https://arxiv.org/abs/2405.06298",
    venue: Annotated[str, typer.Option(help="Where it appeared.")] = "Unpublished",
    footnote: Annotated[str | None, typer.Option(help='Such as "It uses 1M synthetic images."')] = None,
    additional_data: Annotated[
        bool, typer.Option("--additional-data", help="Real images beyond the data set's own were used.")
    ] = False,
    licence: Annotated[str, typer.Option("--licence", "--license", help="Of the weights, SPDX.")] = "apache-2.0",
) -> None:
    """Make a folder for the Hugging Face Hub or a RobustBench submission. Offline; nothing is uploaded.

    The Hub folder holds weights that `puma.load_model` reads, config.json and a model card; a model that was not
    evaluated claims nothing. RobustBench takes a WRN or PreActResNet for 32 pixels with AutoAttack standard on the
    whole test set. The weights are read back and have to give the same logits.

      puma export hub runs/puma-30 --out share --title "PUMA on digits" --dataset digits

      puma export robustbench runs/puma-30 --out share --name Me2026Pruning_WRN-28-10 --title "Pruning for robustness"
    """
    if layout == "robustbench" and name is None:
        raise UsageError("RobustBench needs the model's id", fix="--name Author2026Word_WRN-28-10")
    from puma.evaluation import Evaluation
    from puma.export import Paper, export_hub, export_robustbench
    from puma.models.weights import load_model

    run = model if model.is_dir() else model.parent
    if evaluation is None and model.is_dir():
        default = (run / "best" if checkpoint == "best" else run) / "evaluation.json"
        evaluation = default if default.is_file() else None
    result = None if evaluation is None else Evaluation.read(evaluation)
    network = load_model(model / f"{checkpoint}.safetensors" if model.is_dir() else model)
    paper = Paper(title, authors, link, venue, additional_data, footnote, licence)
    if layout == "hub":
        export_hub(network, out, paper=paper, dataset=dataset, evaluation=result, run=run)
        step = f"hf upload OWNER/NAME {out}"
    else:
        if result is None:
            raise UsageError(f"{model} has not been evaluated", fix=f"puma evaluate {model} --data ... --threat ...")
        export_robustbench(network, out, name=str(name), evaluation=result, paper=paper, dataset=dataset, run=run)
        step = 'open a "New Model" issue at RobustBench with the fields of model_info/'
    echo(f"{out} read back gives the same logits")
    echo(f"next     {step}")
