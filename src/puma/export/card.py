"""The model card: what the model is, how it was made and judged, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puma.errors import UsageError
from puma.export.claim import Claim


@dataclass(frozen=True)
class Paper:
    """What only the author knows; RobustBench's fields of the same names.

    Args:
        name: title of the paper, or of the model.
        authors: comma-separated.
        link: of the paper or the code.
        venue: where it appeared ("Unpublished" if nowhere).
        additional_data: trained on real images beyond the data set's own (synthetic ones do not count).
        footnote: such as how many synthetic images were used.
        licence: of the weights, an SPDX name.
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


def percent(share: float) -> str:
    """As RobustBench writes accuracies.

    >>> percent(0.92441)
    '92.44'
    """
    return f"{100 * share:.2f}"


def accuracy_table(claim: Claim) -> str:
    """Markdown table of what was found: shares, intervals, how many images."""
    lines = ["| | accuracy | 95 % interval | images |", "|---|---|---|---|"]
    rows = [("clean", claim.clean, claim.clean_interval, f"{claim.n_clean:,}")]
    if claim.attacked is not None and claim.attacked_interval is not None:
        attack = "AutoAttack standard" if claim.attack == "standard" else f"{claim.attack} (an upper bound)"
        size = f"{claim.n_test:,}" + (" (stratified subset)" if claim.n_test < claim.n_clean else "")
        rows.append((f"{attack}, {claim.threat}", claim.attacked, claim.attacked_interval, size))
    for what, share, (low, high), size in rows:
        lines.append(f"| {what} | {percent(share)} % | {percent(low)} to {percent(high)} | {size} |")
    return "\n".join(lines)


def model_card(
    title: str,
    config: Mapping[str, Any],
    claim: Claim | None,
    training: Mapping[str, Any],
    paper: Paper,
) -> str:
    """The card's text (Markdown), the same for equal arguments.

    Args:
        title: heading.
        config: of ``config.json``.
        claim: what was found, or None.
        training: facts of the run to list, such as threat model and steps.
        paper: authors and so on.
    """
    facts = "\n".join(f"- {key}: {value}" for key, value in training.items())
    size, channels = config["puma"]["image_size"], config["puma"]["in_channels"]
    judged = accuracy_table(claim) if claim else "Not evaluated: nothing is claimed."
    warnings = "".join(
        f"\n- AutoAttack warned ({entry['flag']}): {entry['means']}. {entry['do']}."
        for entry in (claim.warnings if claim else ())
    )
    return f"""# {title}

A classifier trained to withstand adversarial perturbations, made with PUMA
([arXiv 2405.06298](https://arxiv.org/abs/2405.06298), `puma-robust`).
{paper.name}, {paper.authors} ({paper.venue}), {paper.link}

## Use

`model.py` needs nothing but torch (and safetensors where the weights are in that format):

```python
from model import load

model = load()          # eval mode
logits = model(images)  # float32 [B, {channels}, {size}, {size}] in [0, 1]; the normalisation is inside
```

## Accuracy

{judged}
{warnings}

## Network and training

- architecture: {config["architecture"]} {config["puma"]["name"]}, {config["num_classes"]} classes
- SHA-256 of the weights: {config["puma"]["weights_sha256"]}
{facts}

## Limits

Robustness is claimed for the threat model above only. Images of another kind, other perturbations and other
corruptions were not looked at.{"" if paper.footnote is None else " " + paper.footnote}
"""
