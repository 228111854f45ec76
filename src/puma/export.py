"""Share a model: a folder for the Hugging Face Hub or for a RobustBench submission, made offline and read back."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puma.errors import CheckError, DataError, ModelError, UsageError
from puma.evaluation import Evaluation
from puma.io import atomic_path, read_json, write_bytes, write_json, write_text
from puma.models.weights import load_model, save_model, weights_sha256
from puma.models.zoo import from_robustbench, to_robustbench
from puma.threat import format_eps

TOLERANCE = 1e-6  # difference of a logit, relative to the largest one, that counts as rounding
_FACTS = ("threat", "recipe.objective", "recipe.steps", "recipe.batch_size", "recipe.beta", "seed")


@dataclass(frozen=True)
class Paper:
    """What only the author knows; RobustBench's fields of the same names (title, comma-separated authors, ...).

    ``additional_data``: real images beyond the data set's own; ``licence``: an SPDX name.
    """

    name: str
    authors: str = "Unknown"
    link: str = "https://arxiv.org/abs/2405.06298"
    venue: str = "Unpublished"
    additional_data: bool = False
    footnote: str | None = None
    licence: str = "apache-2.0"

    def __post_init__(self) -> None:
        for field in ("name", "authors", "link", "venue", "licence"):
            value = getattr(self, field)
            if not value.strip() or "\n" in value:
                raise UsageError(f"{field} {value!r} is no single line of text")


def export_hub(
    model: nn.Module,
    out: Path | str,
    *,
    paper: Paper,
    dataset: str = "unknown",
    evaluation: Evaluation | None = None,
    run: Path | str | None = None,
) -> Path:
    """Write ``model.safetensors``, ``config.json`` and the model card ``README.md``; upload with ``hf upload``.

    Args:
        model: of `puma.build_model` (else `ModelError`).
        out: folder to make; `StorageError` if it is not empty or cannot be written.
        paper: authors, licence and so on.
        dataset: what it was trained for, such as ``"cifar10"``.
        evaluation: of these weights (else `DataError`); None claims nothing.
        run: folder of its training, for the card.

    `UsageError` without huggingface_hub, `CheckError` where the folder, read back, gives other logits.
    """
    try:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData
    except ImportError:
        raise UsageError("huggingface_hub is not installed", fix='pip install "puma-robust[hub]"') from None
    config = getattr(model, "config", None)
    if not config:
        why = "only networks of puma.build_model can be rebuilt without their source"
        fix = "share your own source with the weights file"
        raise ModelError(f"{type(model).__name__} cannot be exported", why=why, fix=fix)
    _check_weights(evaluation, model)
    name = f"{config['name']} on {dataset}"
    task: dict[str, Any] = {"task_type": "image-classification", "dataset_type": dataset, "dataset_name": dataset}
    results = [
        EvalResult(metric_type="accuracy", metric_name=what, metric_value=round(share, 6), **task)
        for what, share, _, _ in _accuracies(evaluation)
    ]
    data = ModelCardData(
        license=paper.licence,
        library_name="puma-robust",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", "adversarial-training"],
        datasets=[dataset],
        model_name=name,
        eval_results=results or None,
    )
    use = """```python
# pip install puma-robust huggingface_hub
import puma
from huggingface_hub import hf_hub_download

model = puma.load_model(hf_hub_download("OWNER/NAME", "model.safetensors"))  # eval mode
```"""
    with atomic_path(out, folder=True) as folder:
        save_model(model, folder / "model.safetensors")
        names = list(getattr(model, "class_names", None) or ())
        write_json(folder / "config.json", {**config, "class_names": names, "library": "puma-robust"})
        text = _card(name, config, use, evaluation, paper, run)
        write_text(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))
        _check_logits(model, load_model(folder / "model.safetensors"))
    return Path(out)


def export_robustbench(
    model: nn.Module,
    out: Path | str,
    *,
    name: str,
    evaluation: Evaluation,
    paper: Paper,
    dataset: str = "cifar10",
    run: Path | str | None = None,
) -> Path:
    """Write the files that RobustBench's "New Model" issue asks for; arguments and errors as of `export_hub`.

    They are ``NAME.pt`` (tensors only, RobustBench's keys), ``model_info/DATASET/NORM/NAME.json``, and ``README.md``
    with the entry for its model zoo.

    Args:
        model: a WRN or PreActResNet of `puma.build_model` for 32 pixels.
        name: the model's id, by custom ``<Author><Year><FirstWord>_<architecture>``.
        evaluation: AutoAttack standard on the whole test set, of these weights.
        dataset: RobustBench's name of the data set.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UsageError(f"{name!r} cannot be a model's id", fix="letters, digits, - and _: Wang2023Better_WRN-28-10")
    info = _model_info(evaluation, paper, dataset, model)
    _check_weights(evaluation, model)
    theirs = to_robustbench(model)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in theirs.weights.items()}
    buffer = io.BytesIO()  # on a full disk torch.save fails with an error that does not name the disk
    torch.save(weights, buffer)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in theirs.arguments.items()}
    arguments = ", ".join(f"{key}=nn.{v}" if key == "activation_fn" else f"{key}={v!r}" for key, v in values.items())
    use = f"""The class is `robustbench.model_zoo.architectures`' `{theirs.architecture}`. Entry for the model zoo:

```python
("{name}", {{"model": lambda: {theirs.architecture}({arguments}), "gdrive_id": "..."}}),
```"""
    with atomic_path(out, folder=True) as folder:
        write_bytes(folder / f"{name}.pt", buffer.getvalue())
        target = folder / "model_info" / dataset / evaluation.threat.norm / f"{name}.json"
        write_json(target, info)
        config: Mapping[str, Any] = model.config  # type: ignore[assignment]  # set by build_model; others are refused above
        write_text(folder / "README.md", _card(name, config, use, evaluation, paper, run))
        saved = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
        _check_logits(model, from_robustbench(theirs.architecture, saved, **config))
    return Path(out)


def _check_weights(evaluation: Evaluation | None, model: nn.Module) -> None:
    digest = weights_sha256(model)
    if evaluation is not None and (evaluated := str(evaluation.meta["settings"]["model"])) != digest:
        what = f"the evaluation is of other weights ({evaluated[:12]}) than the model to export ({digest[:12]})"
        raise DataError(what, fix="evaluate the model that you export")


def _check_logits(model: nn.Module, loaded: nn.Module) -> None:
    """Compare the logits of the exported model on eight random images."""
    config: Any = model.config
    shape = (8, config["in_channels"], config["image_size"], config["image_size"])
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = copy.deepcopy(model).cpu().eval()(images), loaded.eval()(images)
    gap = float((logits - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if not gap <= TOLERANCE:
        what = f"the export, read back, gives other logits than the model (they differ by {gap:.2g})"
        raise CheckError(what, why=f"at most {TOLERANCE:g} is rounding")


def _accuracies(evaluation: Evaluation | None) -> list[tuple[str, float, tuple[float, float], str]]:
    """Name, accuracy, 95 % interval and number of images of what an evaluation measured."""
    if evaluation is None:
        return []
    rows = [("clean", evaluation.clean_accuracy, evaluation.clean_interval, f"{evaluation.n_clean:,}")]
    share, interval = evaluation.attacked_accuracy, evaluation.robust_interval
    if share is not None and interval is not None:
        attack = f"{evaluation.attack} (an upper bound)"
        if evaluation.attack == "standard":
            attack = f"AutoAttack standard (pyautoattack {evaluation.meta['environment']['pyautoattack']})"
        size = f"{evaluation.n_test:,}" + (" (stratified subset)" if evaluation.n_test < evaluation.n_clean else "")
        rows.append((f"{attack}, {evaluation.threat}", share, interval, size))
    return rows


def _card(
    title: str, config: Mapping[str, Any], use: str, evaluation: Evaluation | None, paper: Paper, run: Path | str | None
) -> str:
    table = "\n".join(
        f"| {what} | {100 * share:.2f} % | {100 * low:.2f} to {100 * high:.2f} | {size} |"
        for what, share, (low, high), size in _accuracies(evaluation)
    )
    table = "| | accuracy | 95 % interval | images |\n|---|---|---|---|\n" + table if table else "Not evaluated."
    found = evaluation.warnings if evaluation else ()
    warnings = "\n".join(f"- {warning['flag']}: {warning['means']}. {warning['do']}." for warning in found)
    record = Path(run) / "run.json" if run is not None else None
    settings = read_json(record).get("settings", {}) if record is not None and record.is_file() else {}
    facts = [f"- {key.removeprefix('recipe.')}: {settings[key]}" for key in _FACTS if settings.get(key) is not None]
    size, channels = config["image_size"], config["in_channels"]
    return f"""# {title}

A classifier trained to withstand adversarial perturbations with PUMA (`puma-robust`,
[arXiv 2405.06298](https://arxiv.org/abs/2405.06298)). {paper.name}, {paper.authors} ({paper.venue}), {paper.link}

{use}

Input: float images [B, {channels}, {size}, {size}] in [0, 1]. Output: {config["num_classes"]} logits.

## Accuracy

{table}
{warnings}

## Training

{chr(10).join([f"- network: {config['name']}", *facts])}

## Limits

Robustness was measured for the threat model above only, not for other images, perturbations or corruptions. \
{paper.footnote or ""}
"""


def _model_info(evaluation: Evaluation, paper: Paper, dataset: str, model: nn.Module) -> dict[str, Any]:
    """RobustBench's ``model_info``; accuracies are percentages with two decimals, as text."""
    if evaluation.robust_accuracy is None:
        why = "RobustBench lists AutoAttack standard"
        fix = "puma evaluate RUN --data ... --threat ... (its default is AutoAttack standard)"
        raise DataError(f"the evaluation is {evaluation.attack}", why=why, fix=fix)
    if evaluation.n_test < evaluation.n_clean:
        what = f"AutoAttack was run on {evaluation.n_test:,} of {evaluation.n_clean:,} test images"
        fix = "evaluate again without --subset, into another folder"
        raise DataError(what, why="RobustBench lists figures of the whole test set", fix=fix)
    architecture = str((getattr(model, "config", None) or {}).get("name", type(model).__name__))
    for ours, theirs in (("preactresnet", "PreActResNet"), ("wrn", "WideResNet")):
        architecture = re.sub(f"^{ours}", theirs, architecture)
    robust = f"{100 * evaluation.robust_accuracy:.2f}"
    return {
        **{key: value for key, value in asdict(paper).items() if key != "licence" and value is not None},
        "number_forward_passes": 1,
        "dataset": dataset,
        "architecture": architecture,
        "eps": format_eps(evaluation.threat.eps, evaluation.threat.norm),
        "clean_acc": f"{100 * evaluation.clean_accuracy:.2f}",
        "reported": robust,
        "autoattack_acc": robust,
        "unreliable": False,
    }
