"""The margin table in memory, put together from its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from puma.errors import DataError
from puma.io import fingerprint
from puma.margins.parts import PART_ROWS, differences, part_paths, read_meta, read_part, write_part
from puma.margins.status import STATUS_NAMES
from puma.threat import Norm, parse_norm

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = {
    "label": np.int16,
    "predicted": np.int16,
    "margin": np.float32,
    "status": np.int8,
    "steps": np.int16,
    "source": np.int16,
}


@dataclass(frozen=True)
class MarginTable:
    """Margins (and other scores) of a pool's images, in the order of the pool.

    Args:
        label: int16 ``[N]``.
        predicted: int16 ``[N]``, the margin model's class.
        margin: float32 ``[N]``, signed distance to the boundary in ``norm``, pixel units of [0, 1] images; higher is
            easier, negative is misclassified, NaN where there is none.
        status: int8 ``[N]``, codes of `Status`.
        steps: int16 ``[N]``, iterations spent.
        source: int16 ``[N]``, code into ``sources``.
        meta: how it was made; keys ``norm, mode, settings, model, pool``. ``meta["pool"]`` holds ``fingerprint``,
            ``num_classes`` and ``sources``, a list of ``{"name", "role", "rows"}`` in the order of the codes.
        scores: other float columns ``[N]`` by name, such as ``"el2n-adv"``.
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
        for name, kind in _COLUMNS.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=kind))
        columns = {name: getattr(self, name) for name in _COLUMNS} | dict(self.scores)
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"the columns of a margin table differ in length: {lengths}")
        parse_norm(self.meta["norm"])
        rows = sum(source["rows"] for source in self.sources)
        if rows != len(self):
            raise DataError(f"the table has {len(self)} rows but its sources hold {rows}")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def index(self) -> NDArray[np.int64]:
        """int64 ``[N]``: place in the pool, 0 to N-1."""
        return np.arange(len(self), dtype=np.int64)

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
        roles = np.array([source["role"] != "real" for source in self.sources], dtype=bool)
        return roles[self.source]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every column and of how they were made; changes when one bit does."""
        digest = hashlib.sha256(fingerprint(dict(self.meta)).encode())
        for name in _COLUMNS:
            digest.update(getattr(self, name).data)
        for name in sorted(self.scores):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.scores[name]).data)
        return digest.hexdigest()

    def join(self, other: MarginTable) -> MarginTable:
        """Add the scores of ``other``, a table of the same pool.

        Raises:
            DataError: the tables are of different pools.
        """
        mine, theirs = self.meta["pool"]["fingerprint"], other.meta["pool"]["fingerprint"]
        if mine != theirs:
            raise DataError(
                f"these score tables are of different pools ({mine[:12]} and {theirs[:12]})",
                fix="score the same pool for both",
            )
        return replace(self, scores={**self.scores, **other.scores})

    def write(self, folder: Path | str, part_rows: int = PART_ROWS) -> Path:
        """Write the table as parts of ``part_rows`` rows into ``folder``; each part appears whole or not at all."""
        folder = Path(folder)
        for part, start in enumerate(range(0, max(len(self), 1), part_rows)):
            write_part(folder, part, self.rows(start, min(start + part_rows, len(self))), self.meta)
        return folder

    def rows(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """The columns of rows ``start`` to ``stop``, with ``index``, as `write_part` takes them."""
        columns = {name: getattr(self, name)[start:stop] for name in _COLUMNS}
        columns |= {name: column[start:stop] for name, column in self.scores.items()}
        return {"index": np.arange(start, stop, dtype=np.int64), **columns}

    @classmethod
    def read(cls, path: Path | str) -> MarginTable:
        """Read a folder of parts, or one Parquet file, and check that it covers the pool exactly.

        Raises:
            DataError: nothing there, a foreign or broken part, parts of different tables, rows missing or twice.
        """
        paths = part_paths(path)
        meta = read_meta(paths[0])
        total = sum(source["rows"] for source in meta["pool"]["sources"])
        columns: dict[str, NDArray[Any]] = {}
        seen = np.zeros(total, dtype=bool)
        for part in paths:
            if (other := read_meta(part)) != meta:
                raise DataError(
                    f"{part} is of another table than {paths[0].name}",
                    why="; ".join(differences(meta, other)) or "their metadata differ",
                    fix="keep each table in a folder of its own",
                )
            values = read_part(part, meta)
            index = values.pop("index")
            if len(index) and (index.min() < 0 or index.max() >= total):
                raise DataError(f"{part} holds rows beyond the pool's {total}")
            if seen[index].any():
                raise DataError(
                    f"{part} repeats rows from {int(index[seen[index]][0])} on", fix="delete one of the parts"
                )
            seen[index] = True
            for name, value in values.items():
                columns.setdefault(name, np.empty(total, value.dtype))[index] = value
        if not seen.all():
            missing = np.flatnonzero(~seen)
            raise DataError(
                f"{path} lacks {len(missing)} of {total} rows, the first is {missing[0]}",
                why="scoring has not finished, or a part was removed",
                fix="run the same `puma score` command again: it makes only what is missing",
            )
        scores = {name: columns.pop(name) for name in list(columns) if name not in _COLUMNS}
        if "margin" not in columns:
            columns["margin"] = np.full(total, np.nan, np.float32)
        return cls(**columns, meta=meta, scores=scores)

    def to_pandas(self) -> pd.DataFrame:
        """The table as a pandas frame with readable status and source (pandas has to be installed)."""
        import pandas as pd

        names = [source["name"] for source in self.sources]
        columns = {"index": self.index, "label": self.label, "predicted": self.predicted, "margin": self.margin}
        frame = pd.DataFrame(columns | {"steps": self.steps, **self.scores})
        frame["status"] = pd.Categorical.from_codes(self.status, categories=pd.Index(STATUS_NAMES))
        frame["source"] = pd.Categorical.from_codes(self.source, categories=pd.Index(names))
        return frame
