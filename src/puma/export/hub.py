"""A folder for the Hugging Face Hub: safetensors, config.json, model card; written offline, uploaded by hand."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from puma.export.card import Paper, model_card
from puma.export.claim import Claim
from puma.export.folder import run_facts, whole_folder, write_network
from puma.export.network import standalone_config
from puma.export.proof import prove
from puma.io import write_text
from puma.models.weights import weights_sha256, write_safetensors


def export_hub(
    model: nn.Module,
    out: Path | str,
    *,
    paper: Paper,
    dataset: str = "unknown",
    claim: Claim | None = None,
    run: Path | str | None = None,
) -> Path:
    """Write ``model.safetensors``, ``config.json``, ``model.py`` and ``README.md``; a fresh process has to agree.

    File names and configuration are those of ``huggingface_hub.PyTorchModelHubMixin``, which can load the folder too.
    Upload it with ``hf upload NAME FOLDER``.

    Args:
        model: of `puma.build_model`.
        out: folder to make.
        paper: authors, licence and so on.
        dataset: what it was trained for, such as ``"cifar10"``.
        claim: what was found about this model (`Claim.read` of its run folder); None claims nothing.
        run: folder of its training, for the card.

    Returns:
        The folder.

    Raises:
        ModelError: not a network of PUMA.
        DataError: the claim is about other weights.
        StorageError: ``out`` is not empty or cannot be written.
        CheckError: the folder does not load by itself with the same logits.
    """
    out = Path(out)
    arguments = standalone_config(model)
    if claim is not None:
        claim.check_model(weights_sha256(model))
    with whole_folder(out) as folder:
        config = write_network(folder, model, arguments)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        write_safetensors(weights, folder / "model.safetensors", {"format": "pt"})
        facts = run_facts(None if run is None else Path(run))
        card = model_card(f"{config['puma']['name']} on {dataset}", config, claim, facts, paper)
        write_text(folder / "README.md", _front_matter(paper, dataset) + card)
        prove(model, folder, config)
    return out


def _front_matter(paper: Paper, dataset: str) -> str:
    return f"""---
license: {paper.licence}
library_name: pytorch
pipeline_tag: image-classification
tags:
- adversarial-robustness
- adversarial-training
- puma
datasets:
- {dataset}
---

"""
