"""What lies in a study's folder beside its results, read as far as it is there and belongs to the study."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.source import Source
from puma.errors import DataError, PumaError
from puma.files import read_json
from puma.margins import MarginTable
from puma.plan import Plan, read_meta
from puma.report.evaluations import FLAGS_FILE, Judged, read_flags_file
from puma.report.results import Result, read_results
from puma.threat import ThreatModel
from puma.tradeoff import CellKey

T = TypeVar("T")


@dataclass
class Materials:
    """A study's folder. What is absent is None or empty; what is there but unusable is named in ``problems``."""

    folder: Path
    problems: list[str] = field(default_factory=list)

    @cached_property
    def results(self) -> list[Result]:
        """The rows of ``results.parquet``.

        Raises:
            DataError: it is missing or broken; without it there is nothing to report.
        """
        return read_results(self.folder / "results.parquet")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The study's settings, ``study.toml``."""
        path = self.folder / "study.toml"
        return (self._try("settings", lambda: tomllib.loads(path.read_text())) or {}) if path.is_file() else {}

    @cached_property
    def name(self) -> str:
        """The study's name."""
        if self.results:
            return self.results[0].study
        return str(self.settings.get("name") or self.folder.resolve().name)

    @cached_property
    def threat(self) -> ThreatModel | None:
        """The threat model that the study is judged by."""
        text = self.settings.get("threat")
        return self._try("threat model", lambda: ThreatModel.parse(str(text))) if text else None

    @cached_property
    def table(self) -> MarginTable | None:
        """The margin table of the whole pool."""
        path = self.folder / "margins"
        return self._try("margins", lambda: MarginTable.read(path)) if path.is_dir() else None

    @cached_property
    def plan_files(self) -> list[tuple[Path, dict[str, Any]]]:
        """The plans and what they say about themselves, by file name."""
        paths = sorted((self.folder / "plans").glob("*.parquet"))
        metas = [(path, self._try("plan", lambda path=path: read_meta(path))) for path in paths]  # type: ignore[misc]
        return [(path, meta) for path, meta in metas if meta is not None]

    def plan_file(self, row: Result) -> Path | None:
        """The plan behind a row of the results, found by what both say about themselves."""
        paths = [path for path, meta in self.plan_files if _same_choice(meta, row)]
        recipe = re.sub(r"[^A-Za-z0-9._-]+", "_", row.recipe)
        return next((path for path in paths if recipe in path.stem), paths[0] if paths else None)

    def plan(self, row: Result) -> Plan | None:
        """The plan behind a row of the results."""
        path = self.plan_file(row)
        return self._try("plan", lambda: Plan.read(path)) if path else None

    def run_folder(self, row: Result) -> Path | None:
        """The run behind a row of the results: it has the name of its plan."""
        path = self.plan_file(row)
        folder = self.folder / "runs" / path.stem if path else None
        return folder if folder and folder.is_dir() else None

    def done(self, task: str) -> dict[str, Any]:
        """What a finished task recorded."""
        path = self.folder / "done" / f"{task}.json"
        return dict(self._try("record", lambda: read_json(path)) or {}) if path.is_file() else {}

    @cached_property
    def flags(self) -> dict[CellKey, Judged]:
        """Flags of single test images by cell, from the study's ``flags.parquet``."""
        path = self.folder / FLAGS_FILE
        return (self._try("flags", lambda: read_flags_file(path)) or {}) if path.is_file() else {}

    @cached_property
    def quality(self) -> dict[str, Any]:
        """Measured quality of the synthetic images."""
        path = self.folder / "synthetic" / "quality.json"
        if path.is_file():
            return dict(self._try("synthetic quality", lambda: read_json(path)) or {})
        return dict(self.done("synthetic").get("quality") or {})

    @cached_property
    def mislabelled(self) -> list[dict[str, Any]]:
        """Rows of ``mislabelled.parquet``: ``strategy, pool, prune_fraction, seed, share``."""
        path = self.folder / "mislabelled.parquet"
        rows = self._try("mislabelled shares", lambda: pq.read_table(path).to_pylist()) if path.is_file() else None
        return [row for row in rows or [] if row.get("share") is not None]

    @cached_property
    def pool(self) -> Pool | None:
        """The images of the pool, if they are at hand and are those of the margin table."""
        return self._try("images", self._load_pool) if self.settings.get("pool") and self.table is not None else None

    def _load_pool(self) -> Pool:
        settings = self.settings["pool"]
        synthetic = settings.get("synthetic", 0)
        generated = [str(self.folder / "synthetic" / "images.npz")] if synthetic else []
        specs = generated if isinstance(synthetic, int) else [str(spec) for spec in synthetic]
        sources: list[Source] = [load_dataset(str(settings["real"])), *(load_dataset(spec) for spec in specs)]
        pool = Pool(sources)
        expected = self.table.meta["pool"]["fingerprint"] if self.table is not None else pool.fingerprint
        if pool.fingerprint != expected:
            raise DataError(
                f"the images at hand ({pool.fingerprint[:12]}) are not those that were scored ({expected[:12]})"
            )
        return pool

    def _try(self, what: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (PumaError, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            message = error.what if isinstance(error, PumaError) else str(error)
            self.problems.append(f"{what}: {message}")
            return None


def pool_rows(pool: str) -> int | None:
    """How many images a pool holds, from the ``pool`` column of the results; None if it does not say.

    >>> pool_rows("digits:train (898) + images (10000)"), pool_rows("everything")
    (10898, None)
    """
    counts = re.findall(r"\((\d+)\)", pool)
    return sum(map(int, counts)) if counts else None


def _same_choice(meta: dict[str, Any], row: Result) -> bool:
    """Whether a plan is the one of this row; a plan names all parameters of its strategy, a row those that were set."""
    rows = sum(source["rows"] for source in meta["pool"]["sources"])
    params = dict(meta.get("params", {}))
    return (
        meta.get("strategy") == row.strategy
        and meta.get("seed") == row.seed
        and abs(float(meta.get("prune_fraction", 0)) - row.prune_fraction) < 1e-9
        and (pool_rows(row.pool) or rows) == rows
        and {**params, **row.parameters} == params
    )
