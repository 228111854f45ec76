"""``puma show``: what a file or folder is, how it was made and what it holds. ``puma verify``: whether it is whole."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

import puma
from puma.cli.options import Quiet
from puma.cli.output import echo, print_facts
from puma.errors import DataError, ModelError, PumaError
from puma.io import parse_json, read_json, read_toml
from puma.threat import ThreatModel

_SCREEN, _MOST_VALUES, _LISTED = 35, 12, 20
_ARTEFACT = "Margin table, plan, run, study, evaluation, flags, weights, state, settings or data set."
_KINDS = {"margins": "margin table", "model": "weights", "state": "state of a training"}  # others: as in the schema
_NEXT = {
    "margin table": "puma plan --table {path} --threat {threat} --prune-fraction 0.3 --out plan.parquet",
    "table of scores": "puma plan --table MARGINS --table {path} --threat {threat} --strategy NAME --out plan.parquet",
    "plan": "puma train --plan {path} --real SOURCE --threat {threat} --out RUN",
    "run": "puma evaluate {path} --data TEST --threat {threat}",
    "run of another network": "puma evaluate module:factory --weights {path} --data TEST --threat {threat}",
    "study": "puma study status {path}; puma report {path}",
    "settings of a study": "puma study run {path}",
    "recipe": "puma train --recipe {path} --real SOURCE --threat {threat} --out RUN",
    "weights": "puma score {path} SOURCE --out margins",
    "weights without their network": "puma score module:factory SOURCE --weights {path} --out margins",
    "data set": "puma data show {path}",
}
# what tells one plan, table or run from another comes before the rest, which may not fit the screen
_FIRST = (
    "name", "finished", "strategy", "params", "rows", "threat", "prune_fraction", "seed", "norm", "mode", "last metrics"
)  # fmt: skip
Found = tuple[str, dict[str, Any]]  # kind, names and values


def show(
    artefact: Annotated[Path, Argument(help=_ARTEFACT)],
    everything: Annotated[bool, Option("--all", help="Every value, not one screen of them.")] = False,
) -> None:
    """Say what an artefact is, how it was made and what it holds, on one screen. Reads only."""
    kind, facts, following = describe(artefact)
    echo(f"{artefact}: {kind}")
    print_facts(facts, most=None if everything else _SCREEN)
    if following:
        echo(f"next  {following}")


def verify(
    folder: Annotated[Path, Argument(help="Folder of a margin table, run or study, or one file.")], quiet: Quiet = False
) -> None:
    """Check the files of a result: checksums, and the fingerprints that say what each was made from. Reads only.

    Also looks for missing, foreign and repeated parts of margin tables. Lists every bad file; exit code 3 if there is
    one.
    """
    from puma.verify import verify as verify_folder

    result = verify_folder(folder, progress=not quiet)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(result.counts.items()))
    echo(f"read     {counts or 'nothing'}")
    for note in result.notes:
        echo(f"note     {note}")
    if result.problems:
        lines = [error.what + (f" ({error.why})" if error.why else "") for error in result.problems]
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        what = f"{folder}: {len(lines)} problems\n  " + "\n  ".join([*lines[:_LISTED], *more])
        raise DataError(what, fix="restore the files from a copy, or delete them and repeat the command that made them")
    echo(f"verified {folder}: no problem")


def describe(path: Path) -> tuple[str, dict[str, Any], str]:
    """The kind of an artefact, what is known of it, and the command that goes on from it; `DataError` for others."""
    read = _folder if path.is_dir() else _FILES.get(path.suffix, _data_set) if path.is_file() else _data_set
    kind, facts = read(path)
    facts = {name: facts[name] for name in _FIRST if name in facts} | facts
    folder = path.parent if path.name == "run.json" else path
    return kind, facts, _NEXT.get(kind, "").format(path=folder, threat=_threat(facts))


def _threat(facts: dict[str, Any]) -> str:
    """The threat model that an artefact was made for, as `--threat` takes it."""
    settings = facts["settings"] if isinstance(facts.get("settings"), dict) else {}
    threat = facts.get("threat") or settings.get("threat")
    with suppress(PumaError, TypeError, KeyError):
        if isinstance(threat, dict):
            return str(ThreatModel(threat["norm"], threat["eps"]))
        if threat:
            return str(ThreatModel.parse(str(threat)))
        # of margins: `puma score --threat` searches below twice its eps
        return str(ThreatModel(facts["norm"], settings.get("eps") or settings["refine_below"] / 2))
    return f"{facts.get('norm', 'NORM')}:EPS"


def _kind(schema: object, otherwise: str) -> str:
    """The name of a schema, whatever its version."""
    family = str(schema or otherwise).partition("/")[0].removeprefix("puma.").replace(".", " ")
    return _KINDS.get(family, family)


def _folder(path: Path) -> Found:
    if (path / "study.toml").is_file():
        return "study", {"finished tasks": len(list((path / "done").glob("*.json"))), **_toml(path / "study.toml")[1]}
    if parts := sorted(path.glob("part-*.parquet")):
        return _table(parts)
    if (path / "recipe.toml").is_file():
        record = _json(path / "run.json")[1] if (path / "run.json").is_file() else {}
        rows = (path / "metrics.csv").read_text().splitlines() if (path / "metrics.csv").is_file() else []
        facts: dict[str, Any] = {"finished": (path / "last.safetensors").is_file()}
        if len(rows) > 1:
            facts["last metrics"] = dict(zip(rows[0].split(","), rows[-1].split(","), strict=False))
        for file in sorted(path.glob("evaluation*.json")):
            values = _json(file)[1]
            facts[file.stem] = {key: values[key] for key in values if key.endswith("accuracy") or key == "n_test"}
        kind = "run"
        with suppress(ModelError):  # `puma verify` is for damaged ones
            if facts["finished"] and _safetensors(path / "last.safetensors")[0] != "weights":
                kind = "run of another network"
        return kind, facts | record
    for file in (path / "settings.json", path / "features.json"):
        if file.is_file():
            kind, record = _json(file)
            return "folder of shards" if kind == "record" else kind, record
    return _data_set(path)


def _table(paths: list[Path]) -> Found:
    """A table in one or several Parquet files: its metadata, and a line about each column. Images are a data set."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(paths[0]).metadata or {}
        made = parse_json(metadata.get(b"puma", b"{}"), paths[0])
        made = made if isinstance(made, dict) else {}
        schema = made.pop("schema", None) or metadata.get(b"schema", b"").decode(errors="replace")
        if b"huggingface" in metadata or not schema:
            return _data_set(paths[0])
        tables = [pq.read_table(path, page_checksum_verification=True) for path in paths]
        table = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
        frame = table.to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError) as error:
        fix = "`puma verify` names the file of a folder"
        raise DataError(f"{paths[0]} is not a whole Parquet file", why=str(error).strip(), fix=fix) from None
    columns = {name: str(table[name].type) for name in table.column_names if name != "index"}
    for name in columns:
        with suppress(TypeError, ValueError):  # values that have no order and no counts
            columns[name] = _column(frame[name])
    kind = _kind(schema, "table")
    kind = "table of scores" if kind == "margin table" and "margin" not in columns else kind
    return kind, {"rows": len(frame), **made, "columns": columns}


def _column(values: Any) -> str:
    """One line about a column: shares of its values, or its quantiles."""
    from pandas.api.types import is_bool_dtype, is_float_dtype, is_integer_dtype

    known = (values.replace([math.inf, -math.inf], math.nan) if is_float_dtype(values) else values).dropna()
    odd = f", {len(values) - len(known):,} null or not finite" if len(known) < len(values) else ""
    if not len(known):
        return f"empty{odd}"
    if is_bool_dtype(known):
        return f"{known.mean():.1%} true{odd}"
    if is_float_dtype(known):
        points = known.astype(float).quantile([0.05, 0.25, 0.5, 0.75, 0.95])
        return ", ".join(f"{point:.4g}" for point in points) + f" at 5, 25, 50, 75, 95 %{odd}"
    counts = known.value_counts()
    counts = counts[counts > 0].sort_index() if is_integer_dtype(known) else counts[counts > 0]
    if is_integer_dtype(known) and len(counts) > _MOST_VALUES:
        return f"{known.min():,} to {known.max():,}{odd}"
    more = f", ... ({len(counts)} in all)" if len(counts) > _MOST_VALUES else ""
    return ", ".join(f"{value}: {count:,}" for value, count in counts.head(_MOST_VALUES).items()) + more + odd


def _json(path: Path) -> Found:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} is no artefact", why="it is JSON, but not names and values")
    if isinstance(settings := value.get("settings"), dict):  # of a run: what it was made from before its recipe
        order = sorted(settings, key=lambda name: (name.startswith("recipe."), isinstance(settings[name], dict)))
        value["settings"] = {name: settings[name] for name in order}
    return _kind(value.get("schema"), "record"), value


def _toml(path: Path) -> Found:
    values = read_toml(path)
    recipe = {"steps", "learning_rate"} <= values.keys()
    return "settings of a study" if "grid" in values else "recipe" if recipe else "settings", values


def _safetensors(path: Path) -> Found:
    """A safetensors file from its header; the numbers are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header, names = dict(file.metadata() or {}), list(file.keys())
            shapes = [file.get_slice(name).get_shape() for name in names]
        meta = {key: parse_json(value, path) if value[:1] in "{[" else value for key, value in header.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}", why=str(error)) from None
    kind = _kind(meta.get("schema"), "weights")
    own = meta.get("meta")
    if kind == "weights" and not (isinstance(own, dict) and own.get("config")):
        kind += " without their network"
    return kind, {"tensors": len(names), "numbers": sum(map(math.prod, shapes)), **meta}


def _data_set(path: Path) -> Found:
    """Images with labels."""
    import numpy as np

    source = puma.load_dataset(str(path))
    counts = np.bincount(source.labels, minlength=source.num_classes)
    return "data set", {
        "images": len(source),
        "height, width, channels": source.image_shape,
        "classes": [f"{name}: {count:,}" for name, count in zip(source.class_names, counts, strict=True)],
        "fingerprint": source.fingerprint,
    }


_FILES = {".parquet": lambda path: _table([path]), ".safetensors": _safetensors, ".json": _json, ".toml": _toml}
