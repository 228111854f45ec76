"""``puma show``: what a file or folder is, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from puma.errors import DataError

Facts = dict[str, Any]


def show(
    artefact: Annotated[Path, typer.Argument(help="Margin table, plan, run, study, results, weights or data set.")],
) -> None:
    """Say what an artefact is, how it was made and what it holds. Reads only."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kind, facts = describe(artefact)
    table = Table(title=f"{artefact}: {kind}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _flat(facts):
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


def describe(path: Path) -> tuple[str, Facts]:
    """The kind of an artefact and the facts a person asks for first.

    Raises:
        DataError: nothing there, or nothing that PUMA knows.
    """
    if path.is_dir():
        for mark, kind, facts in _FOLDERS:
            if any(path.glob(mark)):
                return kind, facts(path)
        raise DataError(f"{path} holds no table, run or study", fix="name one of its files")
    if path.suffix == ".parquet" and path.is_file():
        return _parquet(path)
    if path.suffix == ".safetensors":
        return "weights", _weights(path)
    if path.name == "evaluation.json":
        from puma.files import read_json

        return "evaluation", dict(read_json(path))
    return "data set", _dataset(path)


def _parquet(path: Path) -> tuple[str, Facts]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file", why=str(error)) from None
    schema = json.loads(metadata[b"puma"])["schema"] if b"puma" in metadata else metadata.get(b"schema", b"").decode()
    if schema.startswith("puma.margins"):
        return "margin table", _margins(path)
    if schema.startswith("puma.plan"):
        return "plan", _plan(path)
    if schema.startswith("puma.results"):
        rows = pq.read_table(path).to_pylist()
        return "results of a study", {f"{row['strategy']}, seed {row['seed']}": _accuracies(row) for row in rows}
    return "data set", _dataset(path)


def _margins(path: Path) -> Facts:
    from puma.margins import STATUS_NAMES, MarginTable

    table = MarginTable.read(path)
    facts: Facts = {"images": len(table), "norm": table.norm, "mode": table.meta.get("mode")}
    facts |= {f"source {source['name']}": f"{source['rows']:,} images, {source['role']}" for source in table.sources}
    counts = np.bincount(table.status, minlength=len(STATUS_NAMES))
    facts |= {f"status {name}": f"{count:,}" for name, count in zip(STATUS_NAMES, counts, strict=True) if count}
    finite = table.margin[np.isfinite(table.margin)]
    if len(finite):
        points = np.quantile(finite, [0.05, 0.25, 0.5, 0.75, 0.95])
        facts["margin at 5, 25, 50, 75, 95 %"] = ", ".join(f"{point:.4f}" for point in points)
    facts["other scores"] = ", ".join(table.scores) or "none"
    return facts | {"fingerprint": table.fingerprint, "made by": {k: v for k, v in table.meta.items() if k != "pool"}}


def _plan(path: Path) -> Facts:
    from puma.plan import Plan

    plan = Plan.read(path)
    full = float((plan.eps[plan.keep] >= np.float32(plan.threat.eps)).mean()) if plan.kept else 0.0
    facts: Facts = {
        "strategy": plan.meta["strategy"],
        "threat model": str(plan.threat),
        "kept": f"{plan.kept:,} of {len(plan):,}",
        "mean eps of the kept": f"{plan.mean_eps:.5f} ({plan.mean_eps / plan.threat.eps:.1%} of the threat model's)"
        if plan.threat.eps
        else "0",
        "kept at full eps": f"{full:.1%}",
    }
    return facts | {name: value for name, value in plan.meta.items() if name not in ("pool", "threat", "strategy")}


def _run(path: Path) -> Facts:
    from puma.files import read_json

    lines = (path / "metrics.csv").read_text().splitlines() if (path / "metrics.csv").exists() else []
    facts: Facts = {"steps logged": max(0, len(lines) - 1)}
    if len(lines) > 1:
        facts["last metrics"] = dict(zip(lines[0].split(","), lines[-1].split(","), strict=False))
    if (path / "evaluation.json").exists():
        facts["evaluation"] = read_json(path / "evaluation.json")
    return facts | {"recipe": (path / "recipe.toml").read_text()}


def _study(path: Path) -> Facts:
    from puma.study.folder import StudyFolder
    from puma.study.results import collect
    from puma.study.status import StudyStatus

    study = StudyFolder.open(path)
    facts: Facts = {"name": study.spec.name, "threat model": study.spec.threat, "recipe": study.spec.recipe}
    facts |= {"cells": len(study.spec.cells()), "finished": f"{StudyStatus(study).done()} %"}
    rows = collect(study)
    return facts | {f"{row['strategy']} {row['params']}, seed {row['seed']}": _accuracies(row) for row in rows}


def _weights(path: Path) -> Facts:
    from puma.models.weights import load_model, weights_sha256

    model = load_model(path)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"network": getattr(model, "config", {}), "parameters": f"{count:,}", "sha256": weights_sha256(model)}


def _dataset(path: Path) -> Facts:
    from puma.data.load import load_dataset

    source = load_dataset(str(path))
    counts = np.bincount(source.labels, minlength=source.num_classes)
    classes = zip(source.class_names, counts, strict=True)
    return {
        "images": f"{len(source):,}",
        "height, width, channels": source.image_shape,
        "classes": ", ".join(f"{name} {count:,}" for name, count in classes),
        "fingerprint": source.fingerprint,
        "more": f"puma data show {path}",
    }


def _accuracies(row: Facts) -> str:
    parts = [f"clean {row['clean_accuracy']:.1%}"]
    if row.get("robust_accuracy") is not None:
        parts.append(f"robust {row['robust_accuracy']:.1%} on {row['n_test']}")
    return ", ".join([*parts, f"{row['kept']:,} images kept"])


def _flat(facts: Facts, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Names and values, one line each; what lies inside another is indented below its name."""
    for name, value in facts.items():
        label = "  " * depth + str(name)
        if isinstance(value, dict) and value:
            yield label, ""
            yield from _flat(value, depth + 1)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            yield label, "\n".join(value) or "none"
        elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
            yield label, "\n".join(", ".join(f"{key} {entry}" for key, entry in item.items()) for item in value)
        else:
            yield label, str(value)


_FOLDERS: list[tuple[str, str, Callable[[Path], Facts]]] = [
    ("study.toml", "study", _study),
    ("part-*.parquet", "margin table", _margins),
    ("recipe.toml", "run", _run),
]
