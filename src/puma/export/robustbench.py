"""A folder for a RobustBench submission: state dict with its keys, model_info JSON, model card, text of the issue."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puma.errors import DataError, UsageError
from puma.export.card import Paper, model_card, percent
from puma.export.claim import Claim
from puma.export.folder import run_facts, whole_folder, write_network
from puma.export.network import robustbench_config
from puma.export.proof import prove
from puma.io import atomic_path, write_json, write_text
from puma.models.weights import weights_sha256

_LISTED = {("cifar10", "Linf", "8/255"), ("cifar10", "L2", "0.5"), ("cifar100", "Linf", "8/255")}


def export_robustbench(
    model: nn.Module,
    out: Path | str,
    *,
    name: str,
    claim: Claim,
    paper: Paper,
    dataset: str = "cifar10",
    run: Path | str | None = None,
) -> Path:
    """Write everything that RobustBench asks for; a fresh process has to load it and agree to 1e-6.

    Args:
        model: a WRN or PreActResNet of `puma.build_model` for 32 pixels.
        out: folder to make.
        name: the model's id, by custom ``<Author><Year><FirstWord>_<architecture>``.
        claim: AutoAttack standard on the whole test set (`Claim.read` of the run folder).
        paper: title, authors and so on.
        dataset: RobustBench's name of the data set.
        run: folder of its training, for the card.

    Returns:
        The folder: ``NAME.pt`` (tensors only), ``model.py``, ``config.json``, ``README.md``, ``new_model_issue.md`` and
        ``model_info/DATASET/NORM/NAME.json``.

    Raises:
        UsageError: a name that cannot be a file's.
        DataError: the claim is of a subset, of a weaker attack, or about other weights.
        ModelError: RobustBench has no class for the network.
        StorageError: ``out`` is not empty or cannot be written.
        CheckError: the folder does not load by itself with the same logits.
    """
    out = Path(out)
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UsageError(f"{name!r} cannot be a model's id", fix="letters, digits, - and _: Wang2023Better_WRN-28-10")
    _check_claim(claim)
    claim.check_model(weights_sha256(model))
    architecture, arguments, config, weights = robustbench_config(model)
    with whole_folder(out) as folder:
        whole = write_network(folder, model, {"num_classes": arguments["num_classes"], **config})
        # through memory: on a full disk torch.save fails with an error that does not say so
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        with atomic_path(folder / f"{name}.pt") as temporary:
            temporary.write_bytes(buffer.getbuffer())
        info = model_info(claim, paper, dataset, str(whole["puma"]["name"]))
        target = folder / "model_info" / dataset / claim.threat.norm / f"{name}.json"
        write_json(target, info)
        card = model_card(name, whole, claim, run_facts(None if run is None else Path(run)), paper)
        write_text(folder / "README.md", f"{card}\n{_zoo_entry(name, architecture, arguments)}")
        write_text(folder / "new_model_issue.md", _issue(info, claim, name))
        prove(model, folder, whole)
    return out


def model_info(claim: Claim, paper: Paper, dataset: str, architecture: str) -> dict[str, Any]:
    """The fields of RobustBench's ``model_info`` JSON; accuracies are percentages with two decimals, as text."""
    robust = _check_claim(claim)
    info: dict[str, Any] = {
        "link": paper.link,
        "name": paper.name,
        "authors": paper.authors,
        "additional_data": paper.additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": paper.venue,
        "architecture": _architecture_name(architecture),
        "eps": claim.eps_text,
        "clean_acc": percent(claim.clean),
        "reported": percent(robust),
        "autoattack_acc": percent(robust),
    }
    if paper.footnote:
        info["footnote"] = paper.footnote
    return {**info, "unreliable": False}


def is_listed(claim: Claim, dataset: str) -> bool:
    """Whether RobustBench has a table for this data set and threat model (of those PUMA knows)."""
    return (dataset, claim.threat.norm, claim.eps_text) in _LISTED


def _check_claim(claim: Claim) -> float:
    """The robust accuracy that RobustBench would list."""
    if claim.attack != "standard" or claim.attacked is None:
        raise DataError(
            f"the evaluation is {claim.attack}",
            why="RobustBench lists AutoAttack standard",
            fix="puma evaluate RUN --threat ... (its default is AutoAttack standard)",
        )
    if claim.n_test < claim.n_clean:
        raise DataError(
            f"AutoAttack judged {claim.n_test:,} of {claim.n_clean:,} test images",
            why="RobustBench lists figures of the whole test set",
            fix="evaluate again without --subset, into another folder",
        )
    return claim.attacked


def _architecture_name(name: str) -> str:
    """``wrn-28-10`` as RobustBench writes it: ``WideResNet-28-10``."""
    return re.sub(r"^wrn", "WideResNet", re.sub(r"^preactresnet", "PreActResNet", name))


def _zoo_entry(name: str, architecture: str, arguments: dict[str, Any]) -> str:
    values = {key: value for key, value in arguments.items() if key != "activation_fn"}
    parts = [f"{key}={tuple(value) if isinstance(value, list) else value!r}" for key, value in values.items()]
    if "activation_fn" in arguments:
        parts.append(f"activation_fn=nn.{arguments['activation_fn']}")
    return f"""## In RobustBench's model zoo

```python
("{name}", {{
    "model": lambda: {architecture}({", ".join(parts)}),
    "gdrive_id": "...",
}}),
```
"""


def _issue(info: dict[str, Any], claim: Claim, name: str) -> str:
    extra = "yes" if info["additional_data"] else "no"
    footnote = f" ({info['footnote']})" if "footnote" in info else ""
    return f"""# [New Model] {name}

**Paper information**

- Paper title: {info["name"]}
- Paper URL: {info["link"]}
- Paper authors: {info["authors"]}

**Leaderboard claims**

- Architecture: {info["architecture"]}
- Dataset: {info["dataset"]}
- Threat model: {claim.threat.norm}
- eps: {info["eps"]}
- Clean accuracy: {info["clean_acc"]} %
- Robust accuracy: {info["autoattack_acc"]} %
- Additional data: {extra}{footnote}
- Evaluation method: AutoAttack standard (pyautoattack {claim.library}), seed \
{claim.seed}, {claim.n_test:,} images
- Checkpoint and code: `{name}.pt` and `model.py` of this folder

**Model Zoo**

- [ ] I want to add my model to the Model Zoo, under MIT or this licence:

```json
{json.dumps(info, indent=2)}
```
"""
