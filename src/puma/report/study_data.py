"""A study's folder as its report reads it, and the verdict on it in plain sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from puma import tradeoff
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.errors import DataError, PumaError
from puma.io import read_json, read_toml
from puma.margins import MarginTable
from puma.plan import Plan
from puma.report.page import points, show
from puma.strategies import regime
from puma.threat import ThreatModel
from puma.tradeoff import BASELINE, CONTROLS, Comparison, Estimate, Flags, Group, RunKey, Setting
from puma.tradeoff import results as tables

T = TypeVar("T")
REDUNDANT = 0.01  # a pool is redundant where random pruning loses less than this, with 95 % confidence
PUBLISHED = "CIFAR-10 at 8/255 with a WRN-28-10: about 8 %, 30 % and 0.7"  # the regime of published results
ATTACKS = {"robust_accuracy": "AutoAttack standard", "pgd_accuracy": "CE + CW PGD", "apgd_accuracy": "APGD-CE"}
"""Accuracy column -> attack behind it; only AutoAttack standard gives a robust accuracy, the others are screens."""


class StudyData:
    """A study's folder, read. What is absent is None or empty; what cannot be read is named in ``problems``.

    ``column`` is the accuracy under ``attack`` that is compared: by default the one that most runs have, AutoAttack
    standard before screens. ``main`` is the group that the page is about (most settings, then the larger pool; the last
    checkpoint where there is one), ``entries`` are its settings, ``subject`` is the one that the verdict is about
    (`puma`, else the first strategy that is not a control, at the prune fraction that most strategies share), ``shown``
    are those of the main table and picture (`none` and the strategies at that prune fraction). `DataError` where
    ``results.parquet`` is missing or broken.
    """

    def __init__(self, folder: Path | str, column: str = "") -> None:
        self.folder, self.problems = Path(folder), list[str]()
        self.rows = tables.read_results(self.folder / tables.RESULTS_FILE)
        self.column = column or max(ATTACKS, key=lambda name: sum(row[name] is not None for row in self.rows))
        self.settings: dict[str, Any] = self._read("settings", read_toml, "study.toml") or {}
        screen = str(self.settings.get("evaluation", {}).get("screen")) if self.column == "pgd_accuracy" else ""
        self.attack = {"cw": "CW PGD", "apgd": "APGD-CE"}.get(screen.partition("-")[0], ATTACKS[self.column])
        strong = self.column == "robust_accuracy"  # nothing else is ever called robust
        self.robust_name = "robust" if strong else f"under {self.attack}"
        self.accuracy_name = "robust accuracy" if strong else f"accuracy {self.robust_name}"
        self.name = str(self.rows[0]["study"] if self.rows else self.settings.get("name") or self.folder.resolve().name)
        threat = self.settings.get("threat")
        self.threat = self._try("threat model", partial(ThreatModel.parse, str(threat))) if threat else None
        paths = sorted((self.folder / "done").glob("[!.]*.json"))
        records = {path.stem: self._read(f"record {path.stem}", read_json, f"done/{path.name}") for path in paths}
        self.records = {name: record for name, record in records.items() if isinstance(record, dict)}

        self.runs = tradeoff.read_runs(self.rows, self.column)
        self.labels = _labels(list(dict.fromkeys(run.setting for run in self.runs)))
        self.flags = self._flags()
        self.comparisons: dict[Group, list[Comparison]] = {}
        attacked = [row for row in self.rows if row[self.column] is not None]
        for entry in tradeoff.compare(attacked, self.flags, robust=self.column):
            self.comparisons.setdefault(entry.group, []).append(entry)

        checkpoint = "last" if any(row["checkpoint"] == "last" for row in self.rows) else "best"
        groups = Counter(run.group for run in self.runs if run.group.checkpoint == checkpoint)
        biggest = max(groups, key=lambda group: (groups[group], self.pool_size(group)), default=None)
        self.main = biggest or Group("", "", "", checkpoint)
        self.entries = self.comparisons.get(self.main, [])
        best = replace(self.main, checkpoint="best")
        self.at_best = {e.setting: e for e in self.comparisons.get(best, [])} if best != self.main else {}
        self.controls = [name for name in CONTROLS if self.entry(name)]
        fractions = Counter(e.setting.prune_fraction for e in self.entries if e.setting.prune_fraction)
        usual = max(fractions, key=lambda fraction: fractions[fraction], default=None)
        others = (entry for entry in self.entries if not entry.setting.is_control)
        self.subject = self.entry("puma", usual) or self.entry("puma") or next(others, None)
        shown = (0, self.subject.setting.prune_fraction if self.subject else 0)
        strategies = [entry for entry in self.entries if entry.setting.strategy not in CONTROLS]
        self.shown = [entry for entry in strategies if entry.setting.prune_fraction in shown]
        mine = sorted((run for run in self.runs if run.group == self.main), key=lambda run: -run.seed)
        self.first_runs = {run.setting: run for run in mine}  # the lowest seed of each setting, attacked or not

    def pool_size(self, group: Group) -> int:
        """Images of a pool: those that the run keeping most of them kept."""
        return max(int(run.kept) for run in self.runs if run.group.pool == group.pool)

    def rows_of(self, group: Group) -> list[dict[str, Any]]:
        """The rows of a group."""
        return [row for row in self.rows if all(row[name] == value for name, value in asdict(group).items())]

    def entry(self, strategy: str, prune_fraction: float | None = None) -> Comparison | None:
        """A setting of the main group by its strategy; of several, the one with fewest parameters of its own."""
        kin = (e for e in self.entries if e.setting.strategy == strategy)
        found = [e for e in kin if prune_fraction in (None, e.setting.prune_fraction)]
        return min(found, key=lambda entry: len(entry.setting.params), default=None)

    def accuracy(self, entry: Comparison, axis: str) -> Estimate:
        """Accuracy of a setting, ``"clean"`` or ``"robust"``, its interval cut to [0, 1].

        With one seed and no flags the interval is over test images alone (Wilson).
        """
        estimate: Estimate = getattr(entry, axis)
        low, high = estimate.low, estimate.high
        if low is None and estimate.seeds == 1:
            low, high = tradeoff.wilson_interval(estimate.value, self.n_test)
        if low is None or high is None:
            return estimate
        return replace(estimate, low=max(low, 0.0), high=min(high, 1.0))

    @cached_property
    def n_test(self) -> int:
        """How many test images were attacked, the fewest of the main group."""
        count = "n_pgd" if self.column == "pgd_accuracy" else "n_test"
        return min((int(row[count]) for row in self.rows_of(self.main) if row[self.column] is not None), default=0)

    @cached_property
    def standard(self) -> StudyData | None:
        """The runs that AutoAttack standard attacked, where most runs only have a screen but `none` has both."""
        data = None if self.column == "robust_accuracy" else StudyData(self.folder, "robust_accuracy")
        return data if data and data.entry(BASELINE) else None

    def strict(self, setting: Setting) -> Comparison | None:
        """A setting under AutoAttack standard, where most runs only have a screen."""
        return next((e for e in self.standard.entries if e.setting == setting), None) if self.standard else None

    @cached_property
    def regime(self) -> dict[str, float]:
        """What is known of it: ``misclassified``, ``below_eps`` and ``ratio`` (robust / clean accuracy of `none`)."""
        numbers = dict(self.records.get("margins", {}).get("regime") or {})
        if self.table is not None and self.threat is not None:
            numbers = regime(self.table, self.threat) or numbers
        none = (self.standard or self).entry(BASELINE)
        if none and none.robust and none.clean.value:
            numbers["ratio"] = none.robust.value / none.clean.value
        return numbers

    @cached_property
    def smaller_eps(self) -> Comparison | None:
        """All data with a smaller uniform eps that is better than `none` in both accuracies on average, if one is."""
        for entry in self.entries:
            smaller = entry.setting.strategy == "uniform-eps" and json.loads(entry.setting.params).get("scale", 1.0) < 1
            changes = (entry.clean_difference, entry.robust_difference)
            if smaller and all(change is not None and change.value > 0 for change in changes):
                return entry
        return None

    def name_of(self, setting: Setting) -> str:
        """Its label without the prune fraction, for where that is the same for all."""
        return self.labels[setting].removesuffix(f" {100 * setting.prune_fraction:g} %")

    @cached_property
    def names(self) -> dict[RunKey, str]:
        """Name of each finished run, which its record, plan and folder share."""
        found = ((name, tradeoff.read_runs(record.get("rows") or [])) for name, record in self.records.items())
        return {run.key: name for name, runs in found for run in runs}

    def plan(self, key: RunKey) -> Plan | None:
        """The plan of a run."""
        return self._read("plan", Plan.read, f"plans/{self.names.get(key)}.parquet")

    @cached_property
    def table(self) -> MarginTable | None:
        """The margin table of the whole pool."""
        return self._read("margins", MarginTable.read, "margins")

    @cached_property
    def pool(self) -> Pool | None:
        """The images of the pool, if they are at hand and are those of the margin table."""
        return self._try("images", partial(self._load_pool, self.settings["pool"])) if "pool" in self.settings else None

    def _load_pool(self, settings: dict[str, Any]) -> Pool | None:
        if self.table is None:
            return None
        synthetic = settings.get("synthetic", 0)
        generated = [self.folder / "synthetic" / "images.npz"] if synthetic else []
        specs = [settings["real"], *(generated if isinstance(synthetic, int) else synthetic)]
        pool = Pool([load_dataset(str(spec)) for spec in specs])
        if pool.fingerprint != self.table.meta["pool"]["fingerprint"]:
            raise DataError("the images at hand are not those that were scored")
        return pool

    def mislabelled(self) -> dict[Setting, list[float]]:
        """Shares mislabelled by the attack, over the seeds, of the settings of the main group's pool and recipe."""
        shares: dict[Setting, list[float]] = {}
        for row in self._read("mislabelled shares", tables.read_mislabelled, tables.MISLABELLED_FILE) or []:
            if (row["pool"], row["recipe"]) == (self.main.pool, self.main.recipe):
                setting = Setting(row["strategy"], row["params"], row["prune_fraction"])
                shares.setdefault(setting, []).append(row["by_attack"])
        return shares

    def _flags(self) -> dict[RunKey, Flags]:
        """Flags of single test images, for the groups in which every run has them: intervals have to be of one kind."""
        attacks = {"robust_accuracy": "standard", "apgd_accuracy": "apgd-ce"}
        attack = attacks.get(self.column) or self.settings.get("evaluation", {}).get("screen")
        stored = self._read("flags", partial(tables.read_flags, attack=attack), tables.FLAGS_FILE) or {}
        incomplete = {run.group for run in self.runs if np.isfinite(run.robust) and run.key not in stored}
        return {key: flags for key, (flags, _) in stored.items() if key[0] not in incomplete}

    def _read(self, what: str, read: Callable[[Path], T], name: str) -> T | None:
        """What lies there, None where nothing does."""
        return self._try(what, partial(read, self.folder / name)) if (self.folder / name).exists() else None

    def _try(self, what: str, read: Callable[[], T]) -> T | None:
        """What ``read`` returns; None, and a line in ``problems``, where the file cannot be used."""
        try:
            return read()
        except (PumaError, OSError) as error:
            self.problems.append(f"{what}: {error.what if isinstance(error, PumaError) else error}")
            return None


def _labels(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Short names: the strategy, the parameters and the prune fraction in which settings of it differ."""
    labels = {}
    for setting in settings:
        kin, params = [s for s in settings if s.strategy == setting.strategy], json.loads(setting.params)
        same = set.intersection(*(set(map(repr, json.loads(other.params).items())) for other in kin))
        own = {name: value for name, value in params.items() if repr((name, value)) not in same}
        short = replace(setting, params=json.dumps(own), prune_fraction=0.0).label
        several = len({other.prune_fraction for other in kin}) > 1
        labels[setting] = f"{short} {100 * setting.prune_fraction:g} %" if several else short
    return labels


@dataclass(frozen=True)
class Verdict:
    """Sentences about a study, names of strategies between backticks.

    ``paper`` compares with training on everything at full eps, ``controls`` with the free controls, ``data`` says what
    holds of training on less data, ``regime`` whether the comparison means anything, ``warnings`` what to know first.
    """

    paper: str
    controls: str = ""
    data: str = ""
    regime: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """Both comparisons."""
        return f"{self.paper} {self.controls}".strip()

    @property
    def sentences(self) -> list[str]:
        """All of it, the most important first."""
        return [text for text in (self.headline, self.data, self.regime, *self.warnings) if text]

    def __str__(self) -> str:
        return "\n".join(self.sentences).replace("`", "")


def verdict(study: StudyData | Path | str) -> Verdict:
    """The verdict on a study's folder; `DataError` without a readable ``results.parquet``."""
    data = study if isinstance(study, StudyData) else StudyData(Path(study))
    if not data.rows:
        return Verdict("No run of this study is finished yet.")
    if not data.entries:
        return Verdict("No run was attacked, so there is no trade-off to show.")
    subject, rest = data.subject, (_regime(data), tuple(_warnings(data)))
    if subject is None:
        return Verdict("Only `none` and the free controls are finished: no strategy to compare yet.", "", "", *rest)
    strict, less = data.strict(subject.setting), _less_data(data, subject)
    if not data.standard or not strict:
        return Verdict(_paper(data, subject), _controls(data, subject), less, *rest)
    # AutoAttack standard leads where it was run; controls that only have the screen are compared under it
    complete = strict.clean_gap.estimate is not None and strict.clean_gap.seeds == strict.clean_gap.of
    controls = _controls(data.standard, strict) if complete else _controls(data, subject)
    screen = f"All runs under a screen, {data.attack}, which is weaker than AutoAttack:"
    screened = f"{screen} `{data.name_of(subject.setting)}` {_both(data, subject)} against `{BASELINE}`. {less}"
    return Verdict(_paper(data.standard, strict), controls, screened, *rest)


def _both(data: StudyData, entry: Comparison) -> str:
    """The two differences of a setting to the baseline."""
    return f"{points(entry.clean_difference, 'clean')} and {points(entry.robust_difference, data.robust_name)}"


def _paper(data: StudyData, subject: Comparison) -> str:
    """The paper's comparison."""
    fewer, name = 1 - subject.kept / data.pool_size(subject.group), data.name_of(subject.setting)
    images = f"{100 * fewer:.0f} % fewer images" if fewer > 0.005 else "all images"
    several = name != data.labels[subject.setting]
    share = f" at prune fraction {100 * subject.setting.prune_fraction:g} %," if several else ""
    start = f"`{name}`{share} with {images}:"
    if subject.clean_difference is None or subject.robust_difference is None:
        clean, attacked = (show(data.accuracy(subject, axis).value, "percent") for axis in ("clean", "robust"))
        return f"{start} clean {clean} %, {data.robust_name} {attacked} %; `{BASELINE}` is not finished yet."
    return f"{start} {_both(data, subject)} against training on everything at full eps."


def _controls(data: StudyData, subject: Comparison) -> str:
    """The free controls, and on which side of them the interval lies."""
    gap, controls = subject.clean_gap, "the free controls (all data with a smaller eps or another TRADES beta)"
    if not data.controls:
        return f"T{controls[1:]} were not run."
    if gap.estimate is None:
        return f"Against {controls}: {gap.note}."
    low, high = gap.estimate.low or 0, gap.estimate.high or 0
    side = "above" if low > 0 else "below" if high < 0 else "no difference shown"
    side = "no interval" if gap.estimate.low is None else side
    some = "" if gap.seeds == gap.of else f", {gap.seeds} of {gap.of} seeds"
    equal = "robustness" if data.column == "robust_accuracy" else f"accuracy {data.robust_name}"
    return f"Against {controls}: {points(gap.estimate, 'clean')} at equal {equal}, {side}{some}."


def _less_data(data: StudyData, subject: Comparison) -> str:
    """What random pruning of the same share says about the pool, and the subject against it."""
    fraction = subject.setting.prune_fraction
    if not fraction or subject.setting.strategy == "random":
        return ""
    random = data.entry("random", fraction)
    if random is None:
        return "Less data: `random` at the same share was not run, so nothing can be said about a saving."
    losses = [random.clean_difference, random.robust_difference]
    loss = f"Less data: random pruning of the same share: {_both(data, random)}"
    if all(change is not None and change.low is not None and change.low > -REDUNDANT for change in losses):
        return f"{loss}, next to nothing. The pool is redundant: no saving of data can be shown on it."
    if all(change is not None and change.high is not None and change.high >= 0 for change in losses):
        return f"{loss}. That is no loss that could be shown, so no saving of data can be claimed here."
    pair = [(entry.setting.strategy, entry.setting.params, fraction) for entry in (random, subject)]
    rows = [r for r in data.rows_of(subject.group) if (r["strategy"], r["params"], r["prune_fraction"]) in pair]
    against = tradeoff.compare(rows, data.flags, robust=data.column, baseline="random")
    mine = next(entry for entry in against if entry.setting == subject.setting)
    return f"{loss}. `{data.name_of(subject.setting)}` against it, at equally many images: {_both(data, mine)}."


def _regime(data: StudyData) -> str:
    known, parts = data.regime, []
    if "misclassified" in known:
        parts.append(f"the margin model misclassifies {100 * known['misclassified']:.1f} % of the pool")
    if "below_eps" in known:
        parts.append(f"{100 * known['below_eps']:.0f} % of it have 0 < margin < eps")
    if "ratio" in known:
        name = "robust" if data.standard else data.robust_name
        parts.append(f"`{BASELINE}` has {name} / clean {known['ratio']:.2f}")
        if not data.smaller_eps:
            parts[-1] += "; no smaller uniform eps beats it in both accuracies"
    return f"Regime: {', '.join(parts)} ({PUBLISHED})." if parts else ""


def _warnings(data: StudyData) -> list[str]:
    warnings, smaller = [], data.smaller_eps
    if data.column != "robust_accuracy" and not data.standard:
        screen = f"accuracy under {data.attack} is a screen, not robust accuracy"
        warnings.append(f"AutoAttack standard was not run: {screen}.")
    if smaller:
        scale, robust = json.loads(smaller.setting.params)["scale"], smaller.robust_difference
        text = f"All data with uniform eps × {scale:g} beats `{BASELINE}` in both accuracies"
        if robust is not None and robust.low is not None and robust.low <= 0:
            text += f", if only on average ({_both(data, smaller)}): a strategy has to be compared with it, too."
        else:
            text += ": this eps is too large for the data, and the comparison with `none` says little about a strategy."
        warnings.append(text)
    if all(len(entry.seeds) == 1 for entry in data.entries):
        what = "One seed: intervals show the choice of test images only; a difference may be luck of the seed."
        warnings.append(what)
    return warnings
