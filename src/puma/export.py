"""Share a model: a folder for the Hugging Face Hub or for a RobustBench submission, made offline and read back."""

from __future__ import annotations

import copy
import io
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puma.errors import CheckError, DataError, ModelError, UsageError
from puma.evaluation import Evaluation
from puma.io import atomic_path, read_json, write_bytes, write_json, write_text
from puma.models.networks import config_of
from puma.models.weights import load_model, save_model, weights_sha256
from puma.models.zoo import from_robustbench, to_robustbench
from puma.threat import format_eps

TOLERANCE = 1e-6  # difference of a logit, relative to the largest one, that counts as rounding
_FACTS = ("threat", "recipe.objective", "recipe.steps", "recipe.batch_size", "recipe.beta", "seed")


@dataclass(frozen=True)
class Paper:
    """What only the author knows; RobustBench's fields of the same names, and the licence of the weights (SPDX)."""

    name: str
    authors: str = "Unknown"
    link: str = "https://arxiv.org/abs/2405.06298"
    venue: str = "Unpublished"
    additional_data: bool = False  # real images beyond the data set's own
    footnote: str | None = None
    licence: str = "apache-2.0"


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

    ``model`` is of `puma.build_model` (else `ModelError`), ``evaluation`` of these weights (else `DataError`) or None,
    ``run`` the folder of its training, for the card. `StorageError` if the folder ``out`` is not empty, `UsageError`
    without huggingface_hub, `CheckError` where the folder, read back, gives other logits.
    """
    try:
        from huggingface_hub import EvalResult, ModelCard, ModelCardData
    except ImportError:
        raise UsageError("huggingface_hub is not installed", fix='pip install "puma-robust[hub]"') from None
    config = config_of(model)
    if not config:
        why, fix = "only networks of puma.build_model can be rebuilt", "share your own source with the weights file"
        raise ModelError(f"{type(model).__name__} cannot be exported", why=why, fix=fix)
    _check_weights(evaluation, model)
    name, shares, measured = f"{config['name']} on {dataset}", {}, ["Not evaluated."]
    if evaluation is not None:
        attack = "AutoAttack standard" if evaluation.attack == "standard" else f"{evaluation.attack} (an upper bound)"
        shares = {"clean": evaluation.clean_accuracy, f"{attack}, {evaluation.threat}": evaluation.attacked_accuracy}
        measured = evaluation.describe().splitlines()
        measured += [f"{one['flag']}: {one['means']}. {one['do']}." for one in evaluation.warnings]
    task: dict[str, Any] = {"task_type": "image-classification", "dataset_type": dataset, "dataset_name": dataset}
    results = [
        EvalResult(metric_type="accuracy", metric_name=what, metric_value=round(share, 6), **task)
        for what, share in shares.items()
        if share is not None
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
    record = Path(run) / "run.json" if run is not None else None
    settings = read_json(record).get("settings", {}) if record is not None and record.is_file() else {}
    facts = [f"- {key.removeprefix('recipe.')}: {settings[key]}" for key in _FACTS if settings.get(key) is not None]
    size, channels = config["image_size"], config["in_channels"]
    text = f"""---
{data.to_yaml()}
---

# {name}

A classifier trained to withstand adversarial perturbations with PUMA (`puma-robust`,
[arXiv 2405.06298](https://arxiv.org/abs/2405.06298)). {paper.name}, {paper.authors} ({paper.venue}), {paper.link}

```python
# pip install puma-robust huggingface_hub
import puma
from huggingface_hub import hf_hub_download

model = puma.load_model(hf_hub_download("OWNER/NAME", "model.safetensors"))  # eval mode
```

Input: float images [B, {channels}, {size}, {size}] in [0, 1]. Output: {config["num_classes"]} logits.

## Accuracy

{chr(10).join(f"- {line}" for line in measured)}

## Training

{chr(10).join([f"- network: {config['name']}", *facts])}

## Limits

Robustness was measured for the threat model above only, not for other images, perturbations or corruptions. \
{paper.footnote or ""}
"""
    with atomic_path(out, folder=True) as folder:
        save_model(model, folder / "model.safetensors")
        names = list(getattr(model, "class_names", None) or ())
        write_json(folder / "config.json", {**config, "class_names": names, "library": "puma-robust"})
        write_text(folder / "README.md", str(ModelCard(text)))
        _check_logits(model, load_model(folder / "model.safetensors"))
    return Path(out)


def export_robustbench(
    model: nn.Module, out: Path | str, *, name: str, evaluation: Evaluation, paper: Paper, dataset: str = "cifar10"
) -> Path:
    """Write the files that RobustBench's "New Model" issue asks for; arguments and errors as of `export_hub`.

    They are ``NAME.pt`` (tensors only, RobustBench's keys), ``model_info/DATASET/NORM/NAME.json``, and ``README.md``
    with the entry for its model zoo. ``model`` is a WRN or PreActResNet for 32 pixels, ``name`` its id, by custom
    ``<Author><Year><FirstWord>_<architecture>``, ``evaluation`` AutoAttack standard on the whole test set.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UsageError(f"{name!r} cannot be a model's id", fix="letters, digits, - and _: Wang2023Better_WRN-28-10")
    if evaluation.robust_accuracy is None:
        why, fix = "RobustBench lists AutoAttack standard", "puma evaluate RUN --data ... --threat ..."
        raise DataError(f"the evaluation is {evaluation.attack}", why=why, fix=fix)
    if evaluation.n_test < evaluation.n_clean:
        what = f"AutoAttack was run on {evaluation.n_test:,} of {evaluation.n_clean:,} test images"
        fix = "evaluate again without --subset, into another folder"
        raise DataError(what, why="RobustBench lists figures of the whole test set", fix=fix)
    _check_weights(evaluation, model)
    theirs, config = to_robustbench(model), config_of(model) or {}
    robust, network = f"{100 * evaluation.robust_accuracy:.2f}", str(config["name"])
    info = {
        **{key: value for key, value in asdict(paper).items() if key != "licence" and value is not None},
        "number_forward_passes": 1,
        "dataset": dataset,
        "architecture": network.replace("preactresnet", "PreActResNet").replace("wrn", "WideResNet"),
        "eps": format_eps(evaluation.threat.eps, evaluation.threat.norm),
        "clean_acc": f"{100 * evaluation.clean_accuracy:.2f}",
        "reported": robust,
        "autoattack_acc": robust,
        "unreliable": False,
    }
    buffer = io.BytesIO()  # on a full disk torch.save fails with an error that does not name the disk
    weights = OrderedDict((key, tensor.detach().cpu().contiguous()) for key, tensor in theirs.weights.items())
    vars(weights)["_metadata"] = {"puma": config}  # where torch keeps what is no tensor; for ``robustbench:NAME``
    torch.save(weights, buffer)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in theirs.arguments.items()}
    arguments = ", ".join(f"{key}=nn.{v}" if key == "activation_fn" else f"{key}={v!r}" for key, v in values.items())
    entry = f'("{name}", {{"model": lambda: {theirs.architecture}({arguments}), "gdrive_id": "..."}}),'
    with atomic_path(out, folder=True) as folder:
        write_bytes(folder / f"{name}.pt", buffer.getvalue())
        write_json(folder / "model_info" / dataset / evaluation.threat.norm / f"{name}.json", info)
        write_text(folder / "README.md", f"Entry for `robustbench.model_zoo`:\n\n```python\n{entry}\n```\n")
        saved = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
        _check_logits(model, from_robustbench(saved, **config))
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
