"""``puma report``: the page of a study or a run, its figures and tables. ``puma export``: a folder to share a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

import puma
from puma.cli.output import echo
from puma.errors import UsageError, unknown

_PAGE = "The page; default report.html in the folder."
_FORMATS = "svg, pdf or csv; repeat it for several."


def report(
    folder: Annotated[Path, Argument(help="A study's or a run's folder.", metavar="FOLDER")],
    out: Annotated[Path | None, Option("--out", "-o", help=_PAGE, dir_okay=False)] = None,
    pdf: Annotated[Path | None, Option(metavar="FILE", dir_okay=False, help="Also a summary of two pages.")] = None,
    export: Annotated[list[str] | None, Option(metavar="FORMAT", help=_FORMATS)] = None,
    export_out: Annotated[Path | None, Option(help="Where exported files go; default export/ in the folder.")] = None,
) -> None:
    """Write the page of a study or a run: one self-contained HTML file, and the verdict of a study in the terminal.

    A study's page begins with the verdict, one picture and one table; the rest is folded. Only results.parquet has to
    be there; all else in the folder adds its part. Of a study that still runs it shows what is finished. A page that
    was made from more than is left in the folder is kept; --out writes another.

        puma report runs/digits
        puma report runs/digits --pdf summary.pdf --export svg --export csv
    """
    from puma.report import export as write_files
    from puma.report import make_report, write_report, write_summary
    from puma.report.page import check_formats

    check_formats(export or [])
    _refresh(folder)
    made = make_report(folder)
    if "verdict" in made.values:
        echo(f"{made.values['verdict']}\n")
    echo(write_report(folder, out, made))
    if pdf is not None:
        echo(write_summary(made, pdf))
    for path in write_files(made, export, export_out or folder / "export") if export else []:
        echo(path)


def _refresh(folder: Path) -> None:
    """Write results.parquet again where a study has finished more than it holds."""
    if not ((folder / "study.toml").is_file() and (folder / "done").is_dir()):
        return
    from puma.study.folder import StudyFolder, collect, write_results
    from puma.tradeoff.results import RESULTS, normal_params, read_results

    study, path = StudyFolder.open(folder), folder / "results.parquet"
    rows = [
        {name: row.get(name) for name in RESULTS.names} | {"params": normal_params(row["params"], path)}
        for row in collect(study)
    ]
    if rows and (not path.is_file() or read_results(path) != rows):
        write_results(study)


_MODEL_ID = "RobustBench: the model's id, <Author><Year><FirstWord>_<architecture>."
_PAPER = "authors, link, venue, footnote, additional_data (real images of elsewhere: true) or licence (SPDX)."


def export(
    layout: Annotated[Literal["hub", "robustbench"], Argument(help="hub (Hugging Face) or robustbench.")],
    model: Annotated[Path, Argument(help="Run folder, or a weights file that PUMA wrote.")],
    out: Annotated[Path, Option("--out", help="Folder to make; it must be empty or absent.")],
    title: Annotated[str, Option(help="Title of the paper, or of the model.")],
    name: Annotated[str | None, Option(help=_MODEL_ID)] = None,
    checkpoint: Annotated[Literal["last", "best"], Option(help="Of a run folder.")] = "last",
    dataset: Annotated[str, Option(help="The data set as the Hub or RobustBench names it.")] = "cifar10",
    fields: Annotated[list[str] | None, Option("--paper", metavar="FIELD=VALUE", help=_PAPER)] = None,
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
    from puma.training.recipe import parse_changes

    run, file = (model, model / f"{checkpoint}.safetensors") if model.is_dir() else (model.parent, model)
    evaluation = (run / "best" if file.stem == "best" else run) / "evaluation.json"
    result = Evaluation.read(evaluation) if evaluation.is_file() else None
    network = puma.load_model(file)
    known = parse_changes(fields or [], "--paper", "venue=ICML")
    for field in known.keys() - Paper.__dataclass_fields__.keys():
        raise unknown("field of --paper", field, Paper.__dataclass_fields__)
    paper = Paper(title, **known)
    if layout == "hub":
        export_hub(network, out, paper=paper, dataset=dataset, evaluation=result, run=run)
        step = f"hf upload OWNER/NAME {out}"
    elif result is None:
        raise UsageError(f"{model} has not been evaluated", fix=f"puma evaluate {model} --data ... --threat ...")
    else:
        export_robustbench(network, out, name=str(name), evaluation=result, paper=paper, dataset=dataset)
        step = 'open a "New Model" issue at RobustBench with the fields of model_info/'
    echo(f"{out} read back gives the same logits\nnext     {step}")
