"""The facts of each kind of artefact that a person asks for first."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puma.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Facts = dict[str, Any]


def margin_table(path: Path) -> Facts:
    """Of a table of margins or other scores, a folder of parts or one file."""
    from puma.margins import STATUS_NAMES, MarginTable

    table = MarginTable.read(path)
    made = {name: value for name, value in table.meta.items() if name != "pool"}
    facts: Facts = {"images": len(table), "norm": table.norm, "mode": table.meta.get("mode")}
    if table.meta.get("mode") == "label-quality":  # every table has a norm; trust in labels is measured in none
        del facts["norm"], made["norm"]
    facts |= {f"source {source['name']}": f"{source['rows']:,} images, {source['role']}" for source in table.sources}
    counts = np.bincount(table.status, minlength=len(STATUS_NAMES))
    facts |= {f"status {name}": f"{count:,}" for name, count in zip(STATUS_NAMES, counts, strict=True) if count}
    finite = table.margin[np.isfinite(table.margin)]
    if len(finite):
        points = np.quantile(finite, [0.05, 0.25, 0.5, 0.75, 0.95])
        facts["margin at 5, 25, 50, 75, 95 %"] = ", ".join(f"{point:.4f}" for point in points)
    facts["other scores"] = ", ".join(table.scores) or "none"
    return facts | {"fingerprint": table.fingerprint, "made by": made}


def plan(path: Path) -> Facts:
    """Of a plan."""
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


def run(path: Path) -> Facts:
    """Of a run's folder, with every evaluation of its last model."""
    from puma.io import read_json

    lines = (path / "metrics.csv").read_text().splitlines() if (path / "metrics.csv").exists() else []
    facts: Facts = {"steps logged": max(0, len(lines) - 1)}
    if len(lines) > 1:
        facts["last metrics"] = dict(zip(lines[0].split(","), lines[-1].split(","), strict=False))
    facts |= {file.stem: read_json(file) for file in sorted(path.glob("evaluation*.json"))}
    return facts | {"recipe": (path / "recipe.toml").read_text()}


def study(path: Path) -> Facts:
    """Of a study's folder, as far as it is."""
    from puma.study.folder import StudyFolder
    from puma.study.results import collect
    from puma.study.status import StudyStatus

    study = StudyFolder.open(path)
    facts: Facts = {"name": study.spec.name, "threat model": study.spec.threat, "recipe": study.spec.recipe}
    facts |= {"cells": len(study.spec.cells()), "finished": f"{StudyStatus(study).done()} %"}
    return facts | _by_cell(collect(study), _accuracies)


def results(path: Path) -> Facts:
    """Of a study's table of results."""
    return _by_cell(_rows(path), _accuracies)


def study_flags(path: Path) -> Facts:
    """Of the flags of all images that a study judged."""

    def say(row: Facts) -> str:
        return ", ".join(f"{share} {name}" for name, share in _shares(row["clean"], row["robust"], row["attack"]))

    return _by_cell(_rows(path), say)


def mislabelled(path: Path) -> Facts:
    """Of the shares of perturbed images that a study's judge disowns."""
    return _by_cell(_rows(path), lambda row: f"{row['share']:.1%}")


def evaluation_flags(path: Path) -> Facts:
    """Of the flags of one evaluation's images, all of them or a piece."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    told = json.loads(table.schema.metadata[b"puma"])
    facts: Facts = {"threat model": told["threat"]} if "threat" in told else {}
    # a piece says which attacks have been through it
    attack = told.get("attack") or ", ".join(entry["attack"] for entry in told.get("log", [])) or "no attack yet"
    facts |= {"attack": attack, "images": f"{len(table):,}"}
    shares = _shares(table["clean_correct"].to_pylist(), table["robust"].to_pylist(), attack)
    facts |= {f"correct {name}": share for name, share in shares}
    broken = Counter(name for name in table["broken_by"].to_pylist() if name is not None)
    return facts | {f"broken by {name}": f"{count:,}" for name, count in broken.items()}


def record(path: Path) -> tuple[str, Facts]:
    """A JSON file: evaluations, the settings of runs and tables; each says what it is."""
    from puma.io import read_json

    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} is no artefact", why="it is JSON, but not names and values")
    judged = str(value.get("schema", "")).startswith("puma.evaluation/") or path.name == "evaluation.json"
    return "evaluation" if judged else "record", value


def settings(path: Path) -> tuple[str, Facts]:
    """A TOML file: of a study what it compares, else what it says.

    Raises:
        UsageError: the settings of a study that cannot be used.
    """
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML", why=str(error)) from None
    if "grid" not in values:
        return "recipe" if {"steps", "learning_rate"} <= values.keys() else "settings", values
    from puma.study.spec import StudySpec

    cells = StudySpec.parse(values, str(path)).cells()
    listed = [f"{cell.label}, {cell.prune_fraction:.0%} pruned, seed {cell.seed}" for cell in cells]
    del values["grid"]
    return "settings of a study", {**values, f"{len(cells)} cells": listed}


def weights(path: Path) -> tuple[str, Facts]:
    """A safetensors file: a network's weights, or all that a training goes on from."""
    from puma.checkpoints import SCHEMA as STATE
    from puma.models.weights import SCHEMA, load_model, load_tensors, read_safetensors, weights_sha256

    tensors, header = read_safetensors(path)
    family = header.get("schema", "").partition("/")[0]
    if family == STATE.partition("/")[0]:
        return "state of a training", _state(*load_tensors(path, STATE))
    if family == SCHEMA.partition("/")[0] and load_tensors(path, SCHEMA)[1].get("config"):
        model = load_model(path)
        count = sum(parameter.numel() for parameter in model.parameters())
        facts: Facts = {"network": getattr(model, "config", {}), "parameters": f"{count:,}"}
    else:  # of a network that PUMA cannot build by itself
        count = sum(tensor.numel() for tensor in tensors.values())
        facts = {"header": header, "tensors": len(tensors), "numbers in them": f"{count:,}"}
    return "weights", facts | {"sha256": weights_sha256(tensors)}


def data_set(path: Path) -> Facts:
    """Of images with labels."""
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


def _state(tensors: dict[str, Tensor], meta: Facts) -> Facts:
    facts: Facts = {"after step": meta["step"], "distinct images seen": f"{np.unpackbits(tensors['seen']).sum():,}"}
    if meta["best_step"]:
        facts["best so far"] = f"step {meta['best_step']}, {meta['best_score']:.1%} robust on validation images"
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        sizes[name.partition(".")[0]] += tensor.numel()
    facts |= {f"numbers in {part}": f"{sizes[part]:,}" for part in ("model", "ema", "momentum")}
    return facts | {"seconds of training": f"{meta['seconds']:.1f}"}


def _rows(path: Path) -> list[Facts]:
    import pyarrow.parquet as pq

    return list(pq.read_table(path).to_pylist())


def _by_cell(rows: list[Facts], say: Callable[[Facts], str]) -> Facts:
    """What ``say`` makes of each row, by cell; where they vary, below the pool, recipe and checkpoint."""
    varying = [name for name in ("pool", "recipe", "checkpoint") if len({row.get(name) for row in rows}) > 1]
    found: Facts = {}
    for row in rows:
        params = "" if row.get("params", "{}") == "{}" else f" {row['params']}"
        cell = f"{row['strategy']}{params}, {row['prune_fraction']:.0%} pruned, seed {row['seed']}"
        group = ", ".join(f"{name} {row[name]}" for name in varying)
        (found.setdefault(group, {}) if group else found)[cell] = say(row)
    return found


def _shares(clean: list[bool | None], robust: list[bool | None], attack: str) -> list[tuple[str, str]]:
    """Accuracies from flags, which are null where an image was not judged."""
    judged = {"clean": [c for c in clean if c is not None], f"under {attack}": [r for r in robust if r is not None]}
    return [(name, f"{np.mean(flags):.1%} of {len(flags):,}") for name, flags in judged.items() if flags]


def _accuracies(row: Facts) -> str:
    parts = [f"clean {row['clean_accuracy']:.1%}"]
    if row.get("robust_accuracy") is not None:
        parts.append(f"robust {row['robust_accuracy']:.1%} on {row['n_test']}")
    return ", ".join([*parts, f"{row['kept']:,} images kept"])
