"""The fingerprints that artefacts carry of each other: what contradicts, and what cannot be told from this folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puma.errors import DataError, PumaError
from puma.provenance.artefacts import Artefact
from puma.provenance.tables import joined_fingerprints
from puma.training.recipe import load_recipe


def contradictions(artefacts: Mapping[Path, Artefact], tables: Mapping[Path, dict[str, Any]]) -> Iterator[PumaError]:
    """Artefacts that were not made from what lies beside them.

    Args:
        artefacts: by path, all that were found whole.
        tables: facts of the margin tables by folder.
    """
    for path, artefact in artefacts.items():
        if artefact.kind == "run":
            yield from _run(path, artefact, artefacts)
        elif artefact.kind == "evaluation":
            yield from _evaluation(path, artefact, artefacts)
        elif artefact.kind == "plan":
            yield from _plan(path, artefact, tables)
        elif artefact.kind == "data":
            yield from _generated(path, artefact, artefacts)


def unresolved(artefacts: Mapping[Path, Artefact], tables: Mapping[Path, dict[str, Any]]) -> Iterator[str]:
    """What artefacts were made from that is not in this folder, one line each."""
    known = {facts.get("fingerprint") for facts in tables.values()}
    if any(made.facts.get("table") not in known for made in artefacts.values() if made.kind == "plan"):
        known |= joined_fingerprints([folder for folder, facts in tables.items() if "fingerprint" in facts])
    weights = {artefact.facts["sha256"] for artefact in artefacts.values() if artefact.kind == "weights"}
    plans = {artefact.facts["fingerprint"] for artefact in artefacts.values() if artefact.kind == "plan"}
    for path, artefact in artefacts.items():
        made = artefact.facts
        if artefact.kind == "plan" and made.get("table") and made["table"] not in known:
            yield f"{path} was made from the table {made['table'][:12]}, which is not here"
        if artefact.kind == "run" and made.get("plan") and made["plan"] not in plans:
            yield f"{path.parent} was trained by the plan {made['plan'][:12]}, which is not here"
        if artefact.kind == "data" and made.get("weights") and made["weights"] not in weights:
            yield f"{path} was drawn by the weights {made['weights'][:12]}, which are not here"
        if artefact.kind == "evaluation" and made.get("model") and made["model"] not in weights:
            yield f"{path} judges the weights {made['model'][:12]}, which are not here"
    for folder, facts in tables.items():
        if facts.get("model") and facts["model"] not in weights:
            yield f"{folder} was measured by the weights {facts['model'][:12]}, which are not here"


def _run(path: Path, run: Artefact, artefacts: Mapping[Path, Artefact]) -> Iterator[PumaError]:
    """A run against its recipe file and, in a study, against the plan of the same name."""
    recipe = path.with_name("recipe.toml")
    settings = {key: value for key, value in run.facts["settings"].items() if key.startswith("recipe.")}
    if settings and recipe.is_file():
        try:
            there = load_recipe(recipe).model_dump(mode="json", exclude={"name", "source"})
        except PumaError as error:
            yield error
            return
        wrong = [key for key, value in settings.items() if there.get(key.removeprefix("recipe.")) != value]
        if wrong:
            yield DataError(
                f"{recipe} is not the recipe of the run beside it",
                why="; ".join(
                    f"{key}: {there.get(key[7:])!r} there, {settings[key]!r} in run.json" for key in wrong[:3]
                ),
            )
    elif settings:
        yield DataError(f"{recipe} is missing", why="a run keeps its recipe beside it")
    runs = path.parent.parent
    plan = runs.parent / "plans" / f"{path.parent.name}.parquet"
    if (
        runs.name == "runs"
        and run.facts.get("plan")
        and plan in artefacts
        and artefacts[plan].facts["fingerprint"] != run.facts["plan"]
    ):
        yield DataError(
            f"{path.parent} was not trained by {plan}",
            why=f"its plan is {run.facts['plan'][:12]}, that one {artefacts[plan].facts['fingerprint'][:12]}",
            fix="one of the two was made anew: train again",
        )


def _evaluation(path: Path, evaluation: Artefact, artefacts: Mapping[Path, Artefact]) -> Iterator[PumaError]:
    """An evaluation against its flags, and against the weights in the same folder."""
    flags = artefacts.get(path.with_suffix(".parquet"))
    if flags is None:
        yield DataError(
            f"{path.with_suffix('.parquet')} is missing or broken", why=f"{path.name} keeps its flags there"
        )
    elif flags.facts.get("identity") != evaluation.facts["identity"]:
        yield DataError(f"{path} and {flags.path.name} are of different evaluations", fix="evaluate again")
    beside = {
        found.path.name: found.facts["sha256"]
        for found in artefacts.values()
        if found.kind == "weights" and found.path.parent == path.parent and found.path.stem in ("last", "best")
    }
    if beside and evaluation.facts["model"] not in beside.values():
        yield DataError(
            f"{path} judges other weights than those beside it",
            why=f"it judged {str(evaluation.facts['model'])[:12]}; here are "
            + ", ".join(f"{name} {sha[:12]}" for name, sha in sorted(beside.items())),
            fix="evaluate again",
        )


def _generated(path: Path, data: Artefact, artefacts: Mapping[Path, Artefact]) -> Iterator[PumaError]:
    """Generated images against the model beside them."""
    model = artefacts.get(path.with_suffix(".diffusion") / "model.safetensors")
    if model is not None and "weights" in data.facts and data.facts["weights"] != model.facts["sha256"]:
        yield DataError(
            f"{path} was not drawn by the model beside it",
            why=f"it was drawn by {data.facts['weights'][:12]}, that one is {model.facts['sha256'][:12]}",
            fix="one of the two was made anew: draw again",
        )


def _plan(path: Path, plan: Artefact, tables: Mapping[Path, dict[str, Any]]) -> Iterator[PumaError]:
    for folder, facts in tables.items():
        if facts.get("fingerprint") == plan.facts["table"] and facts["pool"] != plan.facts["pool"]:
            yield DataError(
                f"{path} names another pool than its table {folder}",
                why=f"{plan.facts['pool'][:12]} and {facts['pool'][:12]}",
                fix="make the plan again",
            )
