"""Check a folder of results: every file read by its own reader, checksums and fingerprints compared. Reads only."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from puma.data.load import load_dataset
from puma.data.npz import read_comment
from puma.errors import DataError, PumaError
from puma.evaluation import Evaluation
from puma.io import fingerprint, parse_json, read_json, read_toml, sha256_file
from puma.margins import MarginTable
from puma.models.weights import load_tensors, read_safetensors, weights_sha256
from puma.plan import Plan
from puma.progress import Progress
from puma.training.recipe import load_recipe


class Artefact(NamedTuple):
    """A readable file or table; ``origins``: what it was made from (its name, fingerprint, where it may lie)."""

    kind: str
    fingerprint: str = ""
    origins: Sequence[tuple[str, str, tuple[Path, ...]]] = ()
    note: str = ""


class Verification(NamedTuple):
    """How many artefacts of each kind are undamaged, all damage and contradictions, and what could not be checked."""

    counts: Counter[str]
    problems: list[PumaError]
    notes: list[str]


def verify(folder: Path | str, *, progress: bool = False) -> Verification:
    """Read everything under ``folder`` (or one file; `DataError` if there is none) and list what is damaged.

    Checksums of shards, weights, evaluations, generated images, Parquet and ``.npz``; schema versions, JSON, TOML;
    complete margin tables; and whether run and recipe, run and plan, evaluation and weights, plan and table, generated
    images and their model belong together.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"{folder} does not exist", fix="name the folder of a margin table, run or study, or one file")
    paths = [folder] if folder.is_file() else [p for p in sorted(folder.rglob("*")) if p.is_file()]
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    result, artefacts = Verification(Counter(), [], []), dict[Path, Artefact]()

    def read(path: Path, reader: Callable[[Path], Artefact]) -> None:
        try:
            artefacts[path] = reader(path)
        except PumaError as error:
            result.problems.append(error)
        except (OSError, pa.ArrowException, zipfile.BadZipFile, ValueError, KeyError) as error:
            result.problems.append(DataError(f"{path} is damaged or cannot be read", why=str(error).strip()[:200]))

    with Progress(f"verifying {folder.name}", sum(p.stat().st_size for p in paths), "bytes", show=progress) as bar:
        for path in paths:
            read(path, _check)
            bar.advance(path.stat().st_size)
    result.notes.extend(f"{path}: {artefact.note}" for path, artefact in artefacts.items() if artefact.note)
    for table in sorted({path.parent for path, artefact in artefacts.items() if artefact.kind == "margin part"}):
        if all(part in artefacts for part in table.glob("part-*.parquet")):
            read(table, _margins)
    result.counts.update(artefact.kind for artefact in artefacts.values())
    known = {artefact.fingerprint for artefact in artefacts.values()}
    for path, artefact in artefacts.items():
        for what, made_from, places in artefact.origins:
            beside = {place: artefacts[place].fingerprint for place in places if place in artefacts}
            if beside and made_from not in beside.values():
                there = ", ".join(f"{place.name} {digest[:12]}" for place, digest in beside.items())
                why = f"it was made from {made_from[:12]}; beside it: {there}"
                fix = "one of the two was made again: repeat the command that made the later one"
                result.problems.append(DataError(f"{path} was not made from the {what} beside it", why=why, fix=fix))
            elif not beside and made_from not in known:
                result.notes.append(f"{path} was made from the {what} {made_from[:12]}, not found here")
    return result


def _check(path: Path) -> Artefact:
    """Compare one file with the checksum beside it, and read it with the reader of its kind."""
    for name in (f"{path.name}.sha256", f".{path.name}.sha256"):  # of `puma generate`, of resumable shards
        stated = path.with_name(name)
        if stated.is_file() and sha256_file(path) not in stated.read_text().split():
            raise DataError(f"{path} is damaged", why=f"its SHA-256 is not the one in {name}")
    return _READERS.get(path.suffix, lambda _: Artefact("other"))(path)


def _parquet(path: Path) -> Artefact:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        for group in range(file.num_row_groups):
            file.read_row_group(group).validate(full=True)
    metadata = schema.metadata or {}
    meta: dict[str, Any] = parse_json(metadata.get(b"puma", b"{}"), path)
    kind = str(meta.get("schema") or metadata.get(b"schema", b"").decode()).partition("/")[0]
    if kind == "puma.plan":
        plan = Plan.read(path)
        table = [("margin table", plan.meta["table"], ())] if plan.meta.get("table") else []
        return Artefact("plan", plan.fingerprint, table)
    if {"img", "image"} & set(schema.names):
        load_dataset(path, verify="full")
        return Artefact("data")
    return Artefact({"puma.margins": "margin part", "puma.evaluation": "flags"}.get(kind, "table"))


def _margins(folder: Path) -> Artefact:
    table = MarginTable.read(folder)
    model = (table.meta.get("model") or {}).get("sha256")
    return Artefact("margin table", table.fingerprint, [("margin model", model, ())] if model else [])


def _npz(path: Path) -> Artefact:
    """Images; the diffusion weights that generated ones name lie in a folder beside them."""
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise DataError(f"{path} is damaged", why=f"the CRC-32 of its member {member!r} does not fit")
    sampler = read_comment(path).get("generator")
    weights = sampler.get("weights") if isinstance(sampler, dict) else None
    beside = path.with_suffix(".diffusion") / "model.safetensors"
    return Artefact("data", origins=[("diffusion model", weights, (beside,))] if weights else [])


def _weights(path: Path) -> Artefact:
    tensors, header = read_safetensors(path)
    if ours := "sha256" in header and "schema" in header:
        load_tensors(path, header["schema"])
    return Artefact("weights", weights_sha256(tensors), note="" if ours else "it carries no checksum")


def _toml(path: Path) -> Artefact:
    if path.name != "recipe.toml":
        read_toml(path)
        return Artefact("settings")
    return Artefact("settings", fingerprint(load_recipe(path).model_dump(mode="json", exclude={"name", "source"})))


def _json(path: Path) -> Artefact:
    value = read_json(path)
    value = value if isinstance(value, dict) else {}
    kind = str(value.get("schema", "")).partition("/")[0]
    if kind == "puma.evaluation":
        Evaluation.read(path)
        beside = tuple(path.with_name(f"{name}.safetensors") for name in ("last", "best"))
        return Artefact("evaluation", origins=[("weights", value["settings"]["model"], beside)])
    if kind != "puma.run":
        return Artefact("record")
    settings = value.get("settings", {})
    recipe = {key[7:]: setting for key, setting in settings.items() if key.startswith("recipe.")}
    origins = [("recipe", fingerprint(recipe), (path.with_name("recipe.toml"),))] if recipe else []
    if settings.get("plan"):  # a study keeps the plan of runs/NAME in plans/NAME.parquet
        plan = path.parent.parent.parent / "plans" / f"{path.parent.name}.parquet"
        origins.append(("plan", settings["plan"], (plan,)))
    return Artefact("run", origins=origins)


_READERS = {".parquet": _parquet, ".safetensors": _weights, ".json": _json, ".toml": _toml, ".npz": _npz}
