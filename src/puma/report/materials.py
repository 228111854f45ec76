"""What lies in a study's folder beside its results, read as far as it is there and belongs to the study."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.source import Source
from puma.errors import DataError, PumaError
from puma.io import read_json
from puma.margins import MarginTable
from puma.plan import Plan
from puma.report.results import Result, read_results
from puma.threat import ThreatModel
from puma.tradeoff import RunKey, read_runs
from puma.tradeoff.tables import FLAGS_FILE, AttackedFlags, read_flags, read_mislabelled

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
    def records(self) -> dict[str, dict[str, Any]]:
        """What each finished task recorded, by the task's name."""
        paths = sorted((self.folder / "done").glob("[!.]*.json"))
        found = {path.stem: self._try("record", read_json, path) for path in paths}
        return {name: record for name, record in found.items() if isinstance(record, dict)}

    @cached_property
    def cell_names(self) -> dict[RunKey, str]:
        """Names of the finished cells, by what names their rows.

        A cell's record, plan and run share its name. Only the record has its rows as well: a plan holds resolved
        parameters, which those of another variant may equal, and no recipe.
        """
        found: dict[RunKey, str] = {}
        for name, record in self.records.items():
            cells = self._try(f"record {name}", read_runs, record.get("rows", []))
            found |= {cell.key: name for cell in cells or []}
        return found

    def plan(self, row: Result) -> Plan | None:
        """The plan behind a row of the results."""
        path = self.folder / "plans" / f"{self.cell_names.get(row.key)}.parquet"
        return self._try("plan", lambda: Plan.read(path)) if path.is_file() else None

    def run_folder(self, row: Result) -> Path | None:
        """The run behind a row of the results."""
        name = self.cell_names.get(row.key)
        folder = self.folder / "runs" / name if name else None
        return folder if folder and folder.is_dir() else None

    @cached_property
    def flags(self) -> dict[RunKey, AttackedFlags]:
        """Flags of single test images by cell, from the study's ``flags.parquet``."""
        path = self.folder / FLAGS_FILE
        return (self._try("flags", lambda: read_flags(path)) or {}) if path.is_file() else {}

    @cached_property
    def quality(self) -> dict[str, Any]:
        """Measured quality of the synthetic images."""
        path = self.folder / "synthetic" / "quality.json"
        if path.is_file():
            return dict(self._try("synthetic quality", lambda: read_json(path)) or {})
        return dict(self.records.get("synthetic", {}).get("quality") or {})

    @cached_property
    def mislabelled(self) -> list[dict[str, Any]]:
        """Rows of ``mislabelled.parquet``: ``strategy, pool, recipe, prune_fraction, seed, share``."""
        path = self.folder / "mislabelled.parquet"
        return (self._try("mislabelled shares", lambda: self._shares(path)) or []) if path.is_file() else []

    def _shares(self, path: Path) -> list[dict[str, Any]]:
        rows = []
        for row in read_mislabelled(path):
            inner = ", ".join(f"{name}={value}" for name, value in sorted(json.loads(row["params"]).items()))
            rows.append(row | {"strategy": f"{row['strategy']}({inner})" if inner else row["strategy"]})
        return rows

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

    def _try(self, what: str, read: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return read(*arguments)
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
