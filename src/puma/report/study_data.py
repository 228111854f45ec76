"""A study's folder as its report reads it: results with their statistics, margins, plans, runs, images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.errors import DataError, PumaError
from puma.io import read_json, read_toml
from puma.margins import MarginTable
from puma.plan import Plan
from puma.strategies.plans import regime
from puma.threat import ThreatModel
from puma.tradeoff import (
    BASELINE,
    CONTROLS,
    Comparison,
    Estimate,
    Flags,
    Group,
    RunKey,
    RunResult,
    Setting,
    compare,
    read_runs,
    wilson_interval,
)
from puma.tradeoff.results import (
    FLAGS_FILE,
    MISLABELLED_FILE,
    RESULTS_FILE,
    read_flags,
    read_mislabelled,
    read_results,
)

T = TypeVar("T")
DRAWS = 500
"""Bootstrap resamples of the test images."""

ATTACKS = {"robust_accuracy": "AutoAttack standard", "pgd_accuracy": "CE + CW PGD", "apgd_accuracy": "APGD-CE"}
"""Accuracy column -> attack behind it; only AutoAttack standard gives a robust accuracy, the others are screens."""


@dataclass(frozen=True)
class Regime:
    """The numbers that say whether a comparison means anything; None where they are not known.

    Args:
        margin_error: share of the pool that the margin model misclassifies.
        below_eps: share of the pool with 0 < margin < eps.
        ratio: robust / clean accuracy of `none`.
        smaller_eps: label of a smaller uniform eps that is better than `none` in both accuracies, on average; empty
            if none is.
    """

    margin_error: float | None
    below_eps: float | None
    ratio: float | None
    smaller_eps: str = ""


@dataclass
class StudyData:
    """A study's folder. What is absent is None or empty; what is there but cannot be read is named in ``problems``.

    Args:
        folder: the study's folder.
        column: the accuracy under attack that is compared; by default the one that most runs have, AutoAttack standard
            before screens.
        problems: what could not be read.
    """

    folder: Path
    column: str = ""
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.column = self.column or max(ATTACKS, key=lambda name: sum(row[name] is not None for row in self.rows))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``results.parquet``.

        Raises:
            DataError: it is missing or broken.
        """
        return read_results(self.folder / RESULTS_FILE)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """``study.toml``."""
        path = self.folder / "study.toml"
        return (self._read("settings", read_toml, path) or {}) if path.is_file() else {}

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.rows[0]["study"] if self.rows else self.settings.get("name") or self.folder.resolve().name)

    @cached_property
    def threat(self) -> ThreatModel | None:
        """The threat model."""
        text = self.settings.get("threat")
        return self._read("threat model", ThreatModel.parse, str(text)) if text else None

    @cached_property
    def comparisons(self) -> dict[Group, list[Comparison]]:
        """The statistics of every setting that was attacked, by group."""
        attacked = [row for row in self.rows if row.get(self.column) is not None]
        groups: dict[Group, list[Comparison]] = {}
        for entry in compare(attacked, self.flags, robust=self.column, draws=DRAWS):
            groups.setdefault(entry.group, []).append(entry)
        return groups

    @cached_property
    def main(self) -> Group | None:
        """The group that the page is about: most settings, then the larger pool, at the last checkpoint if judged."""
        checkpoint = "last" if any(row["checkpoint"] == "last" for row in self.rows) else "best"
        groups = Counter(run.group for run in self.runs if run.group.checkpoint == checkpoint)
        return max(groups, key=lambda group: (groups[group], self.pool_size(group)), default=None)

    @cached_property
    def entries(self) -> list[Comparison]:
        """The settings of the main group, in the order of the table."""
        return self.comparisons.get(self.main, []) if self.main else []

    @property
    def controls(self) -> list[str]:
        """Names of the free controls that were run."""
        return [name for name in CONTROLS if any(entry.setting.strategy == name for entry in self.entries)]

    @cached_property
    def labels(self) -> dict[Setting, str]:
        """Short names: the strategy, the parameters and the prune fraction in which settings of it differ."""
        settings = list(dict.fromkeys(run.setting for run in self.runs))
        return {setting: _label(setting, settings) for setting in settings}

    @cached_property
    def runs(self) -> list[RunResult]:
        """The rows as runs; those that were not attacked have robust accuracy NaN."""
        return read_runs(self.rows, self.column)

    @cached_property
    def first_runs(self) -> dict[Setting, RunResult]:
        """The run of the lowest seed of each setting of the main group, attacked or not."""
        runs = [run for run in self.runs if run.group == self.main]
        return {run.setting: run for run in sorted(runs, key=lambda run: -run.seed)}

    @cached_property
    def best_entries(self) -> list[Comparison]:
        """The settings of the main group at the best checkpoint, where the main one is the last."""
        twin = replace(self.main, checkpoint="best") if self.main else None
        return self.comparisons.get(twin, []) if twin and twin != self.main else []

    def pool_size(self, group: Group) -> int:
        """Images of a pool: those that the run keeping most of them kept."""
        return max(int(run.kept) for run in self.runs if run.group.pool == group.pool)

    def rows_of(self, group: Group) -> list[dict[str, Any]]:
        """The rows of a group."""
        names = ("study", "pool", "recipe", "checkpoint")
        return [row for row in self.rows if all(row[name] == getattr(group, name) for name in names)]

    def find(self, setting: Setting) -> Comparison | None:
        """A setting of the main group."""
        return next((entry for entry in self.entries if entry.setting == setting), None)

    def entry(self, strategy: str, prune_fraction: float | None = None) -> Comparison | None:
        """A setting of the main group by its strategy; of several, the one with fewest parameters of its own."""
        found = [e for e in self.entries if e.setting.strategy == strategy]
        found = [e for e in found if prune_fraction in (None, e.setting.prune_fraction)]
        return min(found, key=lambda entry: len(entry.setting.params), default=None)

    @cached_property
    def subject(self) -> Comparison | None:
        """The setting that the verdict is about: `puma`, else the first strategy that is not a control.

        Of several prune fractions, the one that most strategies were run with.
        """
        fractions = Counter(e.setting.prune_fraction for e in self.entries if e.setting.prune_fraction)
        main = max(fractions, key=lambda f: fractions[f], default=None)
        others = [entry for entry in self.entries if not entry.setting.is_control]
        return self.entry("puma", main) or self.entry("puma") or next(iter(others), None)

    @property
    def shown(self) -> list[Comparison]:
        """`none` and the strategies at the subject's prune fraction: those of the main table and picture."""
        fractions = (0, self.subject.setting.prune_fraction if self.subject else 0)
        entries = [entry for entry in self.entries if entry.setting.strategy not in CONTROLS]
        return [entry for entry in entries if entry.setting.prune_fraction in fractions]

    @cached_property
    def regime(self) -> Regime:
        """The regime of the main group."""
        numbers = dict(self.records.get("margins", {}).get("regime") or {})
        if self.table is not None and self.threat is not None:
            numbers = regime(self.table, self.threat) or numbers
        error, below = numbers.get("misclassified"), numbers.get("below_eps")
        none, smaller = self.entry(BASELINE), ""
        ratio = none.robust.value / none.clean.value if none and none.robust and none.clean.value else None
        for entry in self.entries:
            scale = json.loads(entry.setting.params).get("scale", 1.0)
            changes = (entry.clean_difference, entry.robust_difference)
            better = all(change is not None and change.value > 0 for change in changes)
            if entry.setting.strategy == "uniform-eps" and scale < 1 and better:
                smaller = smaller or f"eps × {scale:g}"
        return Regime(error, below, ratio, smaller)

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """What each finished task recorded, by the task's name."""
        found = {
            path.stem: self._read(f"record {path.stem}", read_json, path)
            for path in sorted((self.folder / "done").glob("[!.]*.json"))
        }
        return {name: record for name, record in found.items() if isinstance(record, dict)}

    @cached_property
    def run_names(self) -> dict[RunKey, str]:
        """Name of each finished run, which its record, plan and folder share."""
        names: dict[RunKey, str] = {}
        for name, record in self.records.items():
            if record.get("rows"):
                runs = self._read(f"record {name}", read_runs, record["rows"]) or []
                names |= {run.key: name for run in runs}
        return names

    def plan(self, key: RunKey) -> Plan | None:
        """The plan of a run."""
        path = self.folder / "plans" / f"{self.run_names.get(key)}.parquet"
        return self._read("plan", Plan.read, path) if path.is_file() else None

    def run_folder(self, key: RunKey) -> Path | None:
        """The folder of a run."""
        name = self.run_names.get(key)
        folder = self.folder / "runs" / name if name else None
        return folder if folder and folder.is_dir() else None

    @cached_property
    def flags(self) -> dict[RunKey, Flags]:
        """Flags of single test images, for the groups in which every run has them: intervals have to be of one kind.

        Flags that do not give the accuracies in the results are named among the problems and not used.
        """
        path = self.folder / FLAGS_FILE
        attacks = {"robust_accuracy": "standard", "apgd_accuracy": "apgd-ce"}
        attack = attacks.get(self.column) or self.settings.get("evaluation", {}).get("screen")
        stored = (self._read("flags", read_flags, path, attack) or {}) if path.is_file() else {}
        found: dict[RunKey, Flags] = {}
        incomplete = set()
        for run in self.runs:
            flags = stored[run.key][0] if run.key in stored else None
            if flags is not None and np.isfinite(run.robust):
                means = [float(np.nanmean(np.asarray(values))) for values in (flags.clean, flags.robust)]
                if np.allclose(means, (run.clean, run.robust), rtol=0, atol=1e-9):
                    found[run.key] = flags
                    continue
                what = f"flags of {run.setting.strategy}, seed {run.seed}"
                self.problems.append(f"{what}: they do not give the accuracies in the results")
            if np.isfinite(run.robust):
                incomplete.add(run.group)
        return {key: flags for key, flags in found.items() if key[0] not in incomplete}

    def accuracy(self, entry: Comparison, axis: str) -> Estimate:
        """Accuracy of a setting, ``"clean"`` or ``"robust"``, its interval cut to [0, 1].

        With one seed and no flags the interval is over test images alone (Wilson).
        """
        estimate: Estimate | None = getattr(entry, axis)
        if estimate is None:
            raise DataError(f"{entry.setting.label} was not attacked")
        low, high = estimate.low, estimate.high
        if (low is None or high is None) and estimate.seeds == 1:
            low, high = wilson_interval(estimate.value, self.n_test)
        if low is None or high is None:
            return estimate
        return replace(estimate, low=max(low, 0.0), high=min(high, 1.0))

    @cached_property
    def n_test(self) -> int:
        """How many test images were attacked, the fewest of the main group."""
        count = "n_pgd" if self.column == "pgd_accuracy" else "n_test"
        attacked = [row for row in self.rows_of(self.main) if row[self.column] is not None] if self.main else []
        return min((int(row[count]) for row in attacked), default=0)

    @cached_property
    def standard(self) -> StudyData | None:
        """The runs that AutoAttack standard attacked, where most runs only have a screen but `none` has both."""
        if self.column == "robust_accuracy":
            return None
        data = StudyData(self.folder, "robust_accuracy")
        return data if data.entry(BASELINE) else None

    @property
    def seeds(self) -> int:
        """Most seeds of a setting of the main group."""
        return max((len(entry.seeds) for entry in self.entries), default=0)

    @property
    def images_resampled(self) -> bool:
        """Whether the choice of test images is in the intervals of the main group."""
        return any(np.isfinite(entry.clean.image_error) for entry in self.entries)

    @cached_property
    def table(self) -> MarginTable | None:
        """The margin table of the whole pool."""
        path = self.folder / "margins"
        return self._read("margins", MarginTable.read, path) if path.is_dir() else None

    @cached_property
    def quality(self) -> dict[str, Any]:
        """Measured quality of the synthetic images."""
        path = self.folder / "synthetic" / "quality.json"
        if path.is_file():
            return dict(self._read("synthetic quality", read_json, path) or {})
        return dict(self.records.get("synthetic", {}).get("quality") or {})

    @cached_property
    def mislabelled(self) -> dict[tuple[str, str, Setting], list[float]]:
        """Shares mislabelled by the attack, over the seeds, by pool, recipe and setting."""
        path = self.folder / MISLABELLED_FILE
        rows = (self._read("mislabelled shares", read_mislabelled, path) or []) if path.is_file() else []
        shares: dict[tuple[str, str, Setting], list[float]] = {}
        for row in rows:
            setting = Setting(row["strategy"], row["params"], row["prune_fraction"])
            shares.setdefault((row["pool"], row["recipe"], setting), []).append(row["by_attack"])
        return shares

    @cached_property
    def pool(self) -> Pool | None:
        """The images of the pool, if they are at hand and are those of the margin table."""
        return self._read("images", self._load_pool) if "pool" in self.settings and self.table is not None else None

    def _load_pool(self) -> Pool:
        settings = self.settings["pool"]
        synthetic = settings.get("synthetic", 0)
        generated = [str(self.folder / "synthetic" / "images.npz")] if synthetic else []
        specs = generated if isinstance(synthetic, int) else [str(spec) for spec in synthetic]
        pool = Pool([load_dataset(spec) for spec in (str(settings["real"]), *specs)])
        expected = self.table.meta["pool"]["fingerprint"] if self.table is not None else pool.fingerprint
        if pool.fingerprint != expected:
            raise DataError(
                f"the images at hand ({pool.fingerprint[:12]}) are not those that were scored ({expected[:12]})"
            )
        return pool

    def _read(self, what: str, read: Callable[..., T], *arguments: Any) -> T | None:
        """What ``read`` returns; None, and a line in ``problems``, where the file cannot be used."""
        try:
            return read(*arguments)
        except (PumaError, OSError) as error:
            self.problems.append(f"{what}: {error.what if isinstance(error, PumaError) else error}")
            return None


def _label(setting: Setting, settings: Sequence[Setting]) -> str:
    kin = [other for other in settings if other.strategy == setting.strategy]
    others = [json.loads(other.params) for other in kin]
    parts = [setting.strategy]
    for name, value in sorted(json.loads(setting.params).items()):
        if any(name not in params or params[name] != value for params in others):
            parts.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    if len({other.prune_fraction for other in kin}) > 1:
        parts.append(f"{100 * setting.prune_fraction:g} %")
    return " ".join(parts)
