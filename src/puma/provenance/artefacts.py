"""One artefact at a time: is it readable, do its checksums hold, and what does it say about its origin."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from puma.errors import DataError, ModelError
from puma.io import read_json
from puma.provenance.rewriting import check_rewritten
from puma.strategies.features import RECORD, check_part

_PUMA, _SCHEMA = b"puma", b"schema"
_OF_STUDIES = ("puma.results/", "puma.flags/", "puma.mislabelled/")
_BATCH = 65_536


@dataclass(frozen=True)
class Artefact:
    """A file that was found whole.

    Args:
        path: the file.
        kind: what it is: ``"margin part"``, ``"plan"``, ``"weights"``, ``"evaluation"``, ``"data"``, ...
        facts: fingerprints it carries, and what it says it was made from.
        unchecked: why nothing but its form could be checked; empty where a checksum was compared.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    unchecked: str = ""


def check(path: Path) -> Artefact:
    """Read a whole file and check what can be checked.

    Raises:
        DataError: a broken table, data file, JSON, TOML or CSV.
        ModelError: broken weights.
    """
    reader = _READERS.get(path.suffix, _unknown)
    return reader(path)


def _parquet(path: Path) -> Artefact:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            for _ in file.iter_batches(_BATCH):
                pass
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is broken", why=str(error).strip()[:200]) from None
    metadata = schema.metadata or {}
    try:
        told = json.loads(metadata.get(_PUMA, b"{}"))
    except ValueError:
        raise DataError(f"{path} is broken", why="its metadata is not JSON") from None
    name = str(told.get("schema") or metadata.get(_SCHEMA, b"").decode("utf-8", "replace"))
    if name.startswith("puma.margins/"):
        return Artefact(path, "margin part")
    if name.startswith("puma.plan/"):
        from puma.plan import Plan

        plan = Plan.read(path)
        check_rewritten(path, lambda empty: plan.write(empty / path.name))
        made = {"table": plan.meta.get("table"), "pool": plan.meta["pool"]["fingerprint"]}
        return Artefact(path, "plan", {"fingerprint": plan.fingerprint, **made})
    if name.startswith("puma.evaluation/"):
        return Artefact(path, "flags", {"identity": told.get("identity")})
    # A study's table; when they had no checksums, they had no metadata but their schema's name.
    if "fingerprints" in told or (name.startswith(_OF_STUDIES) and len(metadata) > 1):
        check_rewritten(path, lambda empty: _write_again(path, empty / path.name))
    if {"img", "image"} & set(schema.names):
        from puma.data.parquet import load_parquet

        load_parquet(path, verify="full")
        return Artefact(path, "data", _drawn_by(told))
    return Artefact(path, name.partition("/")[0].removeprefix("puma.") or "table")


def _write_again(path: Path, target: Path) -> Path:
    """A study's table as `puma.report.evaluations.write_table` writes it."""
    try:
        pq.write_table(pq.read_table(path), target, compression="zstd", write_page_checksum=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is broken", why=str(error).strip()[:200]) from None
    return target


def _npz(path: Path) -> Artefact:
    from puma.data.archive import read_members
    from puma.data.edmfile import read_comment
    from puma.data.npz import check_crc, check_not_bomb

    for member in read_members(path):
        check_not_bomb(member)
        check_crc(member)
    return Artefact(path, "data", _drawn_by(read_comment(path)))


def _npy(path: Path) -> Artefact:
    return Artefact(path, "features") if check_part(path) else _unknown(path)


def _drawn_by(told: dict[str, Any]) -> dict[str, Any]:
    """The weights that drew generated images, as `puma.generation` writes them into the file."""
    drawer = told.get("drawer") if str(told.get("schema", "")).startswith("puma.generated/") else None
    return {"weights": drawer["weights"]} if isinstance(drawer, dict) and "weights" in drawer else {}


def _weights(path: Path) -> Artefact:
    from puma.models.weights import load_tensors, read_safetensors, weights_sha256

    tensors, header = read_safetensors(path)
    facts = {"sha256": weights_sha256(tensors)}
    if "sha256" in header and "schema" in header:
        load_tensors(path, header["schema"])
        return Artefact(path, "weights", facts)
    beside = path.with_name("config.json")
    if path.stem == "model" and beside.is_file() and (expected := read_json(beside).get("sha256")):
        if facts["sha256"] != expected:
            raise ModelError(
                f"{path} is damaged: its checksum does not fit config.json beside it",
                why=f"sha256 {facts['sha256'][:12]} now, {str(expected)[:12]} then",
            )
        return Artefact(path, "weights", facts)
    return Artefact(path, "weights", facts, "it carries no checksum")


def _json(path: Path) -> Artefact:
    value = read_json(path)
    if not isinstance(value, dict):
        return Artefact(path, "record")
    if path.name == RECORD:
        missing = [name for name in value.get("parts", {}) if not path.with_name(name).exists()]
        if missing:
            raise DataError(
                f"{path.parent} lacks {len(missing)} parts of its features, the first is {missing[0]}",
                why="embedding has not finished, or a part was removed",
            )
        return Artefact(path, "record")
    schema = str(value.get("schema", ""))
    if schema.startswith("puma.run/"):
        settings = value.get("settings", {})
        return Artefact(path, "run", {"settings": settings, "plan": settings.get("plan"), "pool": settings.get("pool")})
    if schema.startswith("puma.evaluation/"):
        return Artefact(
            path, "evaluation", {"identity": value.get("identity"), "model": value.get("settings", {}).get("model")}
        )
    return Artefact(path, "record")


def _toml(path: Path) -> Artefact:
    try:
        return Artefact(path, "settings", {"values": tomllib.loads(path.read_text())})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is broken", why=str(error)) from None


def _csv(path: Path) -> Artefact:
    try:
        with path.open(newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is broken", why=str(error)) from None
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise DataError(f"{path} is broken", why=f"line {number} has {len(row)} fields, the first {len(rows[0])}")
    return Artefact(path, "metrics", unchecked="text without a checksum")


def _unknown(path: Path) -> Artefact:
    return Artefact(path, "other", unchecked="not an artefact with a checksum")


_READERS: dict[str, Callable[[Path], Artefact]] = {
    ".parquet": _parquet,
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _weights,
    ".json": _json,
    ".toml": _toml,
    ".csv": _csv,
}
