"""The plan: which images of a pool are kept, and the eps of the attack on each. One Parquet file.

Columns: ``index int64, keep bool, eps float32``. The schema's metadata (key ``puma``, JSON) says how it came about: see
`Plan.meta`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from puma.errors import DataError
from puma.io import atomic_path, fingerprint, read_footer
from puma.margins import METADATA_KEY, notebook_html
from puma.threat import ThreatModel

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SCHEMA_VERSION = "puma.plan/1"
_AGAIN = "make it again with `puma plan`"
_SCHEMA = pa.schema([("index", pa.int64()), ("keep", pa.bool_()), ("eps", pa.float32())])


@dataclass(frozen=True)
class Plan:
    """For each image of a pool, in the order of the pool: kept or not, and the eps of its attack.

    Args:
        keep: bool ``[N]``.
        eps: float32 ``[N]``, finite, >= 0 (else `DataError`), in the threat model's norm, pixel units of [0, 1] images;
            0 where dropped, and where a kept image is not attacked. Only ``uniform-eps`` goes beyond the threat's eps.
        meta: how it was made; keys ``strategy, params, prune_fraction, seed, protect_real, class_balanced, threat,
            table, pool, counts, derived, warnings``. ``table`` is the margin table's fingerprint, ``pool`` the table's.
        beta: the TRADES weight (beta) this plan asks for, or None for the recipe's own.
    """

    keep: NDArray[np.bool_]
    eps: NDArray[np.float32]
    meta: Mapping[str, Any]
    beta: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", np.ascontiguousarray(self.keep, dtype=np.bool_))
        object.__setattr__(self, "eps", np.ascontiguousarray(self.eps, dtype=np.float32))
        if self.keep.shape != self.eps.shape or self.keep.ndim != 1:
            raise DataError(f"keep has the shape {self.keep.shape} and eps {self.eps.shape}", why="both have to be [N]")
        # min and max carry NaN along, so that three reductions check every row without a temporary array
        if len(self) and not (self.eps.min() >= 0 and np.isfinite(self.eps.max())):
            raise DataError("a plan holds an eps that is negative, NaN or infinite")
        if self.eps[~self.keep].any():
            raise DataError("a plan gives an eps to rows that it drops", fix="dropped rows have eps 0")

    def __len__(self) -> int:
        return len(self.keep)

    @property
    def threat(self) -> ThreatModel:
        """The threat model the plan was made for."""
        return ThreatModel(self.meta["threat"]["norm"], self.meta["threat"]["eps"])

    @property
    def strategy(self) -> str:
        """The rule that made the plan."""
        return str(self.meta["strategy"])

    @property
    def warnings(self) -> list[str]:
        """What was found doubtful when the plan was made, one sentence each."""
        return list(self.meta.get("warnings", []))

    @cached_property
    def kept(self) -> int:
        """How many rows are kept."""
        return int(np.count_nonzero(self.keep))

    @cached_property
    def mean_eps(self) -> float:
        """Mean eps over the kept rows, in pixel units; 0 for an empty plan."""
        return float(self.eps.sum(dtype=np.float64) / self.kept) if self.kept else 0.0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every row and of how they were made; changes when one bit does."""
        return fingerprint({**self.meta, "beta": self.beta, "rows": _digest(self.keep, self.eps)})

    @classmethod
    def from_indices(
        cls, pool: Any, keep: ArrayLike, eps: ArrayLike | None = None, *, threat: ThreatModel | str
    ) -> Plan:
        """A plan from a selection of your own; `DataError` for one that does not fit the pool.

        Args:
            pool: a `puma.Pool`, or the margin table of one.
            keep: the rows to keep: indices ``[K]`` into the pool, or a bool mask ``[N]``.
            eps: of the kept rows in the order of ``keep``, ``[K]``, of all rows, ``[N]``, or one number; None for the
                threat model's.
            threat: the threat model of the training to come.
        """
        threat, rows, given_rows = ThreatModel.parse(threat), len(pool), np.asarray(keep).ravel()
        is_mask = given_rows.dtype == np.bool_ and len(given_rows) == rows
        chosen = np.flatnonzero(given_rows) if is_mask else given_rows
        numbers = len(chosen) and np.issubdtype(chosen.dtype, np.integer)
        if not numbers or chosen.min() < 0 or chosen.max() >= rows or len(np.unique(chosen)) != len(chosen):
            why = f"{len(chosen):,} {chosen.dtype}, beginning with {chosen[:5]}; the pool has {rows:,} rows"
            fix = f"give different row numbers from 0 to {rows - 1}, or a bool mask of all rows"
            raise DataError("these are no rows to keep", why=why, fix=fix)
        kept, values = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=np.float32)
        kept[chosen] = True
        given = np.float32(threat.eps) if eps is None else np.asarray(eps, dtype=np.float32)
        if given.shape not in ((), (len(chosen),), (rows,)):
            raise DataError(f"eps has the shape {given.shape}", why=f"{len(chosen)} of {rows} rows are kept")
        values[chosen] = given[chosen] if given.shape == (rows,) and rows != len(chosen) else given
        ThreatModel(threat.norm, max(0.0, float(values.max())))  # refuses 8 for 8/255
        meta: dict[str, Any] = {
            "strategy": "from-indices",
            "params": {},
            "prune_fraction": 1 - len(chosen) / rows,
            "seed": 0,
            "protect_real": False,
            "class_balanced": False,
            "threat": {"norm": threat.norm, "eps": threat.eps},
            "table": None,
            "pool": pool.describe() if hasattr(pool, "describe") else dict(pool.meta["pool"]),
            "counts": {"rows": rows, "kept": len(chosen), "removed": rows - len(chosen), "prunable": rows},
            "derived": {},
            "warnings": [],
        }
        return cls(kept, values, meta)

    def write(self, path: Path | str) -> Path:
        """Write the plan to one Parquet file, whole or not at all; equal plans give equal bytes."""
        header = {**self.meta, "beta": self.beta, "sha256": _digest(self.keep, self.eps)}
        header |= {"schema": SCHEMA_VERSION, "checksum": fingerprint(header)}
        text = json.dumps(header, sort_keys=True, allow_nan=False)
        columns = [pa.array(np.arange(len(self), dtype=np.int64)), pa.array(self.keep), pa.array(self.eps)]
        table = pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata({METADATA_KEY: text.encode()}))
        form = {"use_dictionary": ["eps"], "column_encoding": {"index": "DELTA_BINARY_PACKED"}}
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True, **form)
        return Path(path)

    @classmethod
    def read(cls, path: Path | str) -> Plan:
        """Read a plan; `DataError` unless it is whole and covers its pool exactly."""
        meta, _, _ = read_footer(path, SCHEMA_VERSION, "a plan", "make a plan with `puma plan`")
        try:
            whole = meta.pop("checksum", None) == fingerprint(meta)
            table = pq.read_table(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:  # also NaN in the description
            raise DataError(f"{path} is broken", why=str(error).strip(), fix=_AGAIN) from None
        if not whole:
            raise DataError(f"{path} is broken: its description does not fit its checksum", fix=_AGAIN)
        beta, digest = meta.pop("beta", None), meta.pop("sha256", None)
        if table.schema.remove_metadata() != _SCHEMA or any(column.null_count for column in table.columns):
            why = "a plan holds index int64, keep bool, eps float32"
            raise DataError(f"{path} has other columns than a plan", why=why)
        index, keep, eps = (table.column(name).to_numpy() for name in _SCHEMA.names)
        rows = sum(source["rows"] for source in meta["pool"]["sources"])
        if len(index) != rows or not np.array_equal(index, np.arange(rows)):
            why = f"{len(index)} rows; its pool has {rows}, each of which has to be there once, in order"
            raise DataError(f"{path} lacks rows or repeats them", why=why, fix=_AGAIN)
        if digest != _digest(keep, eps):
            why, fix = "it was damaged, or changed without PUMA", f"{_AGAIN}, or change it with puma.Plan and write it"
            raise DataError(f"{path} is broken: its rows do not fit their checksum", why=why, fix=fix)
        return cls(keep, eps, meta, beta)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a histogram of the eps of the kept images; return the matplotlib axes."""
        from puma.plots import figure_style, plot_eps

        with figure_style():
            axes = plot_eps(self.eps[self.keep], self.threat.norm, ax)
            axes.set_title(f"{self.strategy}: {self.kept:,} of {len(self):,} images")
        return axes

    def __repr__(self) -> str:
        kept = f"{self.kept:,} of {len(self):,} images kept"
        return f"<Plan {self.strategy}, {self.threat}: {kept}, mean eps {self.mean_eps:.4g}>"

    def _repr_html_(self) -> str:
        by_source = self.meta.get("counts", {}).get("by_source", [])
        rows = [(one["name"], f"{one['kept']:,} of {one['rows']:,}") for one in by_source]
        return notebook_html(repr(self)[1:-1], self.eps[self.keep], rows)

    def to_pandas(self) -> pd.DataFrame:
        """The plan as a pandas frame with ``index, keep, eps``."""
        import pandas as pd

        return pd.DataFrame({"index": np.arange(len(self), dtype=np.int64), "keep": self.keep, "eps": self.eps})


def read_selection(path: Path | str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Rows to keep, and perhaps their eps, for `Plan.from_indices`; `DataError` for a file without them.

    ``.npy`` with indices or a mask; ``.parquet`` or ``.csv`` with columns ``index`` (and ``eps``); text: indices.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False), None
        import pandas as pd

        names = None if path.suffix == ".csv" else ["index"]
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, names=names, dtype={"index": np.int64})
        return frame["index"].to_numpy(), frame["eps"].to_numpy(dtype=np.float32) if "eps" in frame else None
    except (ValueError, OverflowError, KeyError, OSError, EOFError, pa.ArrowException) as error:
        fix = "one index per line, or columns index and eps"
        raise DataError(f"{path} holds no selection", why=str(error), fix=fix) from None


def _digest(keep: NDArray[np.bool_], eps: NDArray[np.float32]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(keep).data)
    digest.update(np.ascontiguousarray(eps).data)
    return digest.hexdigest()
