"""The margin table: one row per image of a pool, Parquet parts in a folder, readable without PUMA.

Columns: ``index int64, label int16, predicted int16, margin float32, status, steps int16, source``. The schema's
metadata (key ``puma``, JSON) holds `MarginTable.meta`, the schema version and a SHA-256 of the part. Tables of other
scores (``el2n-adv``, ``label_quality``, ...) have float32 columns of their own in place of ``margin``.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.errors import DataError
from puma.io import atomic_path, fingerprint, read_footer, settings_diff
from puma.threat import Norm, ThreatModel, parse_norm

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SCHEMA_VERSION = "puma.margins/2"
PART_ROWS = 65_536
METADATA_KEY = b"puma"
LABEL_QUALITY, LABEL_ISSUE = "label_quality", "label_issue"  # columns of `puma.scoring.labels.score_labels`
Columns = dict[str, NDArray[Any]]


class Status(IntEnum):
    """How a margin came about. The margin of the last three is NaN; failures are never reported as 0."""

    CROSSED = 0
    """The boundary was crossed, seen in float32."""
    MISCLASSIFIED = 1
    """The model gives another class: minus the distance to the label's region, -inf where no way there was found."""
    ESTIMATED = 2
    """A first-order estimate (mode fast, or above ``refine_below``); no crossing was confirmed."""
    UNCONVERGED = 3
    NO_GRADIENT = 4
    NAN = 5

    @property
    def text(self) -> str:
        """The name in tables and on screens, as in ``no-gradient``."""
        return self.name.lower().replace("_", "-")


STATUS_NAMES = tuple(status.text for status in Status)
_TABLE_COLUMNS = {
    "label": np.int16,
    "predicted": np.int16,
    "margin": np.float32,
    "status": np.int8,
    "steps": np.int16,
    "source": np.int16,
}
_ARROW_TYPES = {"index": pa.int64(), "label": pa.int16(), "predicted": pa.int16(), "steps": pa.int16()}
_MOST_CLASSES = 1 << 15  # labels are int16
_ROWS_PER_BYTE = 64  # a part that claims more rows than this for each byte of its file is forged
_REDO = "delete it and run the same `puma score` command: it makes only this part again"


@dataclass(frozen=True, repr=False)
class MarginTable:
    """Margins (and other scores) of a pool's images, in the order of the pool.

    Args:
        label, predicted: int16 ``[N]``: the image's class, and that of the margin model.
        margin: float32 ``[N]``, signed distance to the boundary in ``norm``, pixel units of [0, 1] images; higher is
            easier, negative is misclassified, NaN where there is none.
        status, steps: int8 ``[N]``, codes of `Status`; int16 ``[N]``, iterations spent.
        source: int16 ``[N]``, code into ``sources``.
        meta: how it was made; keys ``norm, mode, settings, model, pool``. ``meta["pool"]`` holds ``fingerprint``,
            ``num_classes`` and ``sources``, a list of ``{"name", "role", "rows"}`` in the order of the codes.
        scores: other float32 columns ``[N]`` by name, such as ``"el2n-adv"``.

    `DataError` for columns of different lengths, labels outside the pool's classes, or rows that the pool lacks.
    """

    label: NDArray[np.int16]
    predicted: NDArray[np.int16]
    margin: NDArray[np.float32]
    status: NDArray[np.int8]
    steps: NDArray[np.int16]
    source: NDArray[np.int16]
    meta: Mapping[str, Any]
    scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in _TABLE_COLUMNS.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=kind))
        parse_norm(self.meta["norm"])
        lengths = {name: len(column) for name, column in self._columns().items()}
        lengths["sources"] = sum(source["rows"] for source in self.sources)
        if len(set(lengths.values())) != 1:
            raise DataError(f"the columns of a margin table differ in length: {lengths}")
        for name, codes, count in (("label", self.label, self.num_classes), ("source", self.source, len(self.sources))):
            if len(codes) and not 0 <= codes.min() <= codes.max() < count:
                raise DataError(f"{name}s of the table reach from {codes.min()} to {codes.max()}, not 0 to {count - 1}")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def norm(self) -> Norm:
        """The norm the margins are measured in."""
        return parse_norm(self.meta["norm"])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """``{"name", "role", "rows"}`` of each source, in the order of the codes in `source`."""
        return list(self.meta["pool"]["sources"])

    @property
    def num_classes(self) -> int:
        """How many classes the pool has."""
        return int(self.meta["pool"]["num_classes"])

    @property
    def synthetic(self) -> NDArray[np.bool_]:
        """bool ``[N]``: rows whose source is not real."""
        return np.array([source["role"] != "real" for source in self.sources], dtype=bool)[self.source]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every column and of how they were made; changes when one bit does."""
        return _digest(self._columns(), self.meta)

    def _columns(self) -> Columns:
        return {name: getattr(self, name) for name in _TABLE_COLUMNS} | dict(self.scores)

    def join(self, other: MarginTable) -> MarginTable:
        """Add the scores of ``other``, a table of the same pool (else `DataError`)."""
        mine, theirs = self.meta["pool"]["fingerprint"][:12], other.meta["pool"]["fingerprint"][:12]
        if mine != theirs:
            raise DataError(f"the tables are of different pools ({mine}, {theirs})", fix="score the same pool for both")
        return replace(self, scores={**self.scores, **other.scores})

    def write(self, folder: Path | str, part_rows: int = PART_ROWS) -> Path:
        """Write the table as parts of ``part_rows`` rows into ``folder``; each part appears whole or not at all."""
        for part, start in enumerate(range(0, max(len(self), 1), part_rows)):
            rows = slice(start, min(start + part_rows, len(self)))
            columns: Columns = {"index": np.arange(rows.start, rows.stop, dtype=np.int64)}
            columns |= {name: column[rows] for name, column in self._columns().items()}
            with atomic_path(part_path(folder, part)) as temporary:
                write_part(temporary, columns, self.meta)
        return Path(folder)

    @classmethod
    def read(cls, path: Path | str) -> MarginTable:
        """Read a folder of parts, or one Parquet file; `DataError` unless it is whole and covers the pool exactly."""
        path = Path(path)
        paths = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
        if not paths or not paths[0].is_file():
            raise DataError(f"no margin table at {path}", fix="make one with `puma score`")
        headers = [read_header(part) for part in paths]  # all of them before any memory is taken
        meta, rows = headers[0][0], sum(count for _, count, _ in headers)
        total = sum(source["rows"] for source in meta["pool"]["sources"])
        columns: Columns = {}
        start = 0
        for number, (part, (other, count, _)) in enumerate(zip(paths, headers, strict=True)):
            if other != meta:
                why, fix = "; ".join(settings_diff(meta, other)), "keep each table in a folder of its own"
                raise DataError(f"{part} is of another table than {paths[0].name}", why=why, fix=fix)
            values = read_part(part, meta)
            index, named = values.pop("index"), part in (path, part_path(path, number))
            if count and index[0] > start and part != part_path(path, number):  # one before it is missing
                break
            if not named or (index != np.arange(start, start + count)).any():
                what = f"{part} does not hold rows {start} to {start + count - 1}, as part {number} of the table has to"
                why = f"its rows begin with {index[0]}: a part under another number?" if count else "it is empty"
                raise DataError(what, why=why, fix=_REDO)
            for name, value in values.items():
                columns.setdefault(name, np.empty(rows, value.dtype))[start : start + count] = value
            start += count
        if start != total:
            what = f"{path} lacks {total - rows} of {total} rows, the first is {start}"
            what = what if rows < total else f"{path} holds {rows} rows, the pool {total}"
            fix = "run the same `puma score` command again: it makes only what is missing"
            raise DataError(what, why="scoring has not finished, or a part was removed", fix=fix)
        scores = {name: columns.pop(name) for name in list(columns) if name not in _TABLE_COLUMNS}
        columns.setdefault("margin", np.full(total, np.nan, np.float32))
        return cls(**columns, meta=meta, scores=scores)

    def to_pandas(self) -> pd.DataFrame:
        """The table as a pandas frame with readable status and source."""
        import pandas as pd

        names = [source["name"] for source in self.sources]
        columns = {"index": np.arange(len(self), dtype=np.int64)} | self._columns()
        order = ("index", "label", "predicted", "margin", "steps", *self.scores)
        frame = pd.DataFrame({name: columns[name] for name in order})
        frame["status"] = pd.Categorical.from_codes(self.status, categories=pd.Index(STATUS_NAMES))
        frame["source"] = pd.Categorical.from_codes(self.source, categories=pd.Index(names))
        return frame

    def counts(self) -> dict[str, int]:
        """Rows of each status that occurs, by its name."""
        counts = np.bincount(self.status, minlength=len(Status))
        return {status.text: int(counts[status]) for status in Status if counts[status]}

    def plot(self, threat: ThreatModel | str | None = None, ax: Axes | None = None) -> Axes:
        """Histogram of the finite margins of each status; with a threat model (of the same norm), a line at its eps."""
        from puma.plots import plot_margins

        if not np.isfinite(self.margin).any():
            raise DataError("the table has no finite margins to plot", why=f"it was made by mode {self.meta['mode']}")
        parsed = None if threat is None else ThreatModel.parse(threat)
        if parsed and parsed.norm != self.norm:
            raise DataError(f"margins are in {self.norm}, the threat model {parsed} is not")
        margins = {text: self.margin[self.status == STATUS_NAMES.index(text)] for text in self.counts()}
        return plot_margins(margins, self.norm, parsed.eps if parsed else None, ax)

    def __repr__(self) -> str:
        parts = [f"{count:,} {text}" for text, count in self.counts().items()]
        positive = self.margin[np.isfinite(self.margin) & (self.margin > 0)]
        parts += [f"median positive margin {np.median(positive):.4g}"] if len(positive) else []
        parts += [f"scores {', '.join(sorted(self.scores))}"] if self.scores else []
        return f"<MarginTable {len(self):,} images, {self.norm}, {self.meta['mode']}: {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        shares = [(text, f"{count:,}", f"{count / len(self):.1%}") for text, count in self.counts().items()]
        return notebook_html(repr(self)[1:-1], self.margin[np.isfinite(self.margin)], shares)


def notebook_html(text: str, values: NDArray[Any], rows: Iterable[tuple[str, ...]]) -> str:
    """What a notebook shows: a text, a histogram of finite values as a line of characters, and a table."""
    line = ""
    if len(values):
        bars = np.histogram(values, 40)[0]
        line = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * int(bar) // int(bars.max()))] for bar in bars)
        line = f"<br><code>{values.min():.3g} {line} {values.max():.3g}</code>"
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div>{html.escape(text)}{line}<table>{cells}</table></div>"


def part_path(folder: Path | str, part: int) -> Path:
    """Where part number ``part`` of a table lies."""
    return Path(folder) / f"part-{part:06d}.parquet"


def write_part(path: Any, columns: Columns, meta: Mapping[str, Any]) -> None:
    """Write ``index`` and columns as in `MarginTable` to a path or file, not atomically; equal rows, equal bytes."""
    texts = {"status": STATUS_NAMES, "source": [source["name"] for source in meta["pool"]["sources"]]}
    arrays: dict[str, pa.Array] = {}
    for name, column in columns.items():
        if name in texts:
            codes = pa.array(column, pa.int8() if name == "status" else pa.int16())
            arrays[name] = pa.DictionaryArray.from_arrays(codes, pa.array(texts[name], pa.string()))
        else:
            arrays[name] = pa.array(column, _ARROW_TYPES.get(name, pa.float32()))
    record = {"schema": SCHEMA_VERSION, "sha256": _digest(columns, meta), **meta}
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    table = pa.table(arrays).replace_schema_metadata({METADATA_KEY: text.encode()})
    pq.write_table(table, path, write_page_checksum=True, compression="zstd")


def part_size(columns: Columns, meta: Mapping[str, Any]) -> int:
    """Bytes that these rows would take as a part."""
    sink = pa.BufferOutputStream()
    write_part(sink, columns, meta)
    return int(sink.getvalue().size)


def read_part(path: Path | str, meta: Mapping[str, Any] | None = None) -> Columns:
    """Columns of one part, checksums verified (else `DataError`), status and source as codes.

    ``meta``, by default the part's own metadata, gives the order of the sources.
    """
    own, rows, digest = read_header(path)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged", why=str(error).strip(), fix=_REDO) from None
    if nulls := [name for name in table.column_names if table.column(name).null_count]:
        raise DataError(f"{path} has no value in some rows of column {', '.join(nulls)}", fix=_REDO)
    known = {"status": list(STATUS_NAMES), "source": [source["name"] for source in (meta or own)["pool"]["sources"]]}
    columns: Columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if name in known:  # texts as codes, however the file happened to encode them
            column = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
            texts, names = column.dictionary.to_pylist(), known[name]
            if wrong := [text for text in texts if text not in names]:
                raise DataError(f"{path} has the unknown value {wrong[0]!r}", why=f"known are {', '.join(names[:9])}")
            order = np.array([names.index(text) for text in texts] or [0], dtype=np.int16)
            columns[name] = order[column.indices.to_numpy(zero_copy_only=False)]
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    if table.num_rows != rows or _digest(columns, own) != digest:
        raise DataError(f"{path} is damaged", why="its checksum does not fit its contents", fix=_REDO)
    return columns


def _digest(columns: Columns, meta: Mapping[str, Any]) -> str:
    """SHA-256 of a part's columns and metadata; page checksums alone would not see a flipped bit in the footer."""
    digest = hashlib.sha256(fingerprint(dict(meta)).encode())
    for name in sorted(columns):
        kind = _TABLE_COLUMNS.get(name, np.int64 if name == "index" else np.float32)
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(columns[name], kind).data)
    return digest.hexdigest()


def read_header(path: Path | str) -> tuple[dict[str, Any], int, str]:
    """Metadata, number of rows and SHA-256 of one part, from its footer; `DataError` for what no table can be."""
    meta, schema, rows = read_footer(path, SCHEMA_VERSION, "a margin table", "score the pool again")
    digest = str(meta.pop("sha256", ""))
    try:
        pool, classes = meta["pool"], meta["pool"]["num_classes"]
        numbers = [classes, *(source["rows"] for source in pool["sources"])]
        texts = [meta["norm"], meta["mode"], pool["fingerprint"]]
        texts += [source[key] for source in pool["sources"] for key in ("name", "role")]
        sound = all(type(number) is int for number in numbers) and all(type(text) is str for text in texts)
    except (KeyError, TypeError, IndexError):
        sound = False
    if not sound:
        raise DataError(f"{path} does not say which pool it is of", why="its metadata are incomplete", fix=_REDO)
    most = _ROWS_PER_BYTE * Path(path).stat().st_size
    if rows > most or min(numbers) < 0 or not 0 < classes <= _MOST_CLASSES:
        why = f"a file of its size holds at most {most:,} rows, a table at most {_MOST_CLASSES:,} classes"
        raise DataError(f"{path} claims {rows:,} rows and {classes:,} classes", why=why)
    known = [*_ARROW_TYPES, "status", "source"]
    needed = known if set(schema.names) - set(known) else [*known, "margin"]
    if wrong := [name for name in dict.fromkeys([*needed, *schema.names]) if schema.names.count(name) != 1]:
        raise DataError(f"{path} lacks column {', '.join(wrong)}, or has it twice", fix=_REDO)
    for name in schema.names:
        kind, wanted = schema.field(name).type, _ARROW_TYPES.get(name, pa.float32())
        if name in ("status", "source"):
            wanted, kind = pa.string(), kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind != wanted:
            raise DataError(f"column {name} of {path} is {kind}, not {wanted}", fix=_REDO)
    return meta, rows, digest
