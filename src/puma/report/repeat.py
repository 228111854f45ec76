"""The last section: every setting, fingerprint, version and the command that somebody needs to repeat a study."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from puma._version import __version__
from puma.io import sha256_file
from puma.report.choices import Choice
from puma.report.content import Code, Heading, Item, Note, Section, Settings, Table
from puma.report.materials import Materials

_WHERE = ("host", "threads", "torch", "numpy", "puma")
_FIRST_SEED = "What identifies the artefacts; of the plans, those of the first seed."
_COMMAND = "{checkout}\npip install {versions}.\npuma study run study.toml --out repeated/\npuma report repeated/"


def repeat_section(materials: Materials, choices: Sequence[Choice]) -> Section:
    """Settings, fingerprints, versions, times and the command."""
    items: list[Item] = []
    path = materials.folder / "study.toml"
    if materials.settings:
        items += [
            "Save the settings below as `study.toml` and run the commands in a clone of PUMA's repository. The same "
            "machine type, thread count and library versions give the same bytes; others differ by rounding that "
            "training amplifies.",
            Code(_COMMAND.format(checkout=_checkout(materials), versions=_versions(materials))),
            Heading("The study"),
            Code(path.read_text()),
        ]
    else:
        items.append(Note("warning", "There is no `study.toml` beside these results: their settings are not known."))
    for name, recipe in _recipes(materials):
        items.append(Settings(recipe, f"Recipe {name}"))
    items += [
        Heading("Fingerprints"),
        Table("fingerprints", ["artefact", "SHA-256"], _fingerprints(materials, choices), _FIRST_SEED),
    ]
    items += _machines(materials)
    return Section("To repeat it", items)


def _checkout(materials: Materials) -> str:
    """How to come to the code that ran; a comment where that was not recorded or is more than one commit."""
    commits, versions = _recorded(materials, "commit"), _recorded(materials, "puma")
    if len(commits) == 1 and not commits[0].endswith("-dirty"):
        return f"git checkout {commits[0]}"
    if commits:
        return "\n".join(["# ran from, with uncommitted changes where it says dirty:", *(f"#   {c}" for c in commits)])
    ran = f"ran with PUMA {', '.join(versions)}" if versions else f"this page was made by PUMA {__version__}"
    return f"# the commit that ran was not recorded; {ran}"


def _versions(materials: Materials) -> str:
    """The libraries that ran, as pip takes them, where every piece had the same; a build's name is not part of it."""
    found = {name: _recorded(materials, name) for name in ("torch", "numpy")}
    return "".join(f"{name}=={seen[0].partition('+')[0]} " for name, seen in found.items() if len(seen) == 1)


def _recorded(materials: Materials, name: str) -> list[str]:
    """The values that the finished pieces recorded under a name, each once."""
    values: Iterable[Any] = (record.get(name) for record in materials.records.values())
    return list(dict.fromkeys(str(value) for value in values if value))


def _recipes(materials: Materials) -> list[tuple[str, dict[str, Any]]]:
    """The settings of each recipe: the study's own copy, or that of the first run that used it."""
    found: dict[str, dict[str, Any]] = {}
    for row in materials.results:
        if row.recipe in found:
            continue
        run = materials.run_folder(row)
        copies = [
            materials.folder / "recipes" / f"{Path(row.recipe).stem}.toml",
            *([run / "recipe.toml"] if run else []),
        ]
        if path := next((path for path in copies if path.is_file()), None):
            found[row.recipe] = tomllib.loads(path.read_text())
    return list(found.items())


def _fingerprints(materials: Materials, choices: Sequence[Choice]) -> list[list[Any]]:
    rows = [[name, _file(materials.folder / name)] for name in ("study.toml", "results.parquet")]
    if table := materials.table:
        rows += [["pool", str(table.meta["pool"]["fingerprint"])], ["margin table", table.fingerprint]]
        rows += _margin_models(table.meta.get("model"))
    rows += [[f"plan: {choice.label}", choice.plan.fingerprint] for choice in choices]
    return [[name, f"`{value}`"] for name, value in rows if value]


def _margin_models(model: Any) -> list[list[Any]]:
    """The weights of the margin model, or of each of several."""
    named = model if isinstance(model, Mapping) else {}
    if parts := named.get("cross_fitted") or named.get("ensemble"):
        count = len(parts)
        return [[f"margin model {i} of {count}, weights", _weights(part)] for i, part in enumerate(parts, 1)]
    return [["margin model, weights", _weights(model)]]


def _weights(model: Any) -> str | None:
    sha256 = model.get("sha256") if isinstance(model, Mapping) else model
    return None if sha256 is None else str(sha256)


def _file(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _machines(materials: Materials) -> list[Item]:
    """Where the tasks ran and how long they took, as the study recorded them."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for record in materials.records.values():
        if "seconds" in record:
            key = tuple(str(record.get(name) or "unknown") for name in _WHERE)
            groups.setdefault(key, []).append(float(record["seconds"]))
    if not groups:
        return []
    rows = [[*key, len(seconds), sum(seconds) / 3600] for key, seconds in groups.items()]
    head = [*_WHERE, "tasks", "hours"]
    return [
        Heading("Where it ran"),
        Table("machines", head, rows, "Hours are the sum over tasks, some of which ran side by side."),
    ]
