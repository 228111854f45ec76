"""The result of an evaluation: accuracies with intervals, a flag for every image, settings, log and warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.errors import DataError
from puma.io import atomic_path, read_json, sha256_file, write_json
from puma.margins import notebook_html
from puma.threat import ThreatModel
from puma.tradeoff import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA = "puma.evaluation/1"
METADATA_KEY = b"puma"
CLEAN = "clean"
_FIGURES = (
    "attack", "clean_accuracy", "clean_interval", "n_clean", "robust_accuracy", "attacked_accuracy", "robust_interval",
    "apgd_accuracy", "n_test",
)  # fmt: skip
_META = ("identity", "settings", "environment", "log", "warnings")


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """A model's accuracies under a threat model.

    Args:
        threat: the threat model.
        attack: ``"standard"`` for AutoAttack standard, else the name of a weaker attack, or ``"clean"``.
        label: int64 ``[N]``, of every test image.
        attacked: bool ``[N]``: the attack was run on it (False outside a subset).
        broken_by: object ``[N]``: None where robust or not attacked, ``"clean"`` where misclassified without attack,
            else the attack that broke it.
        meta: identity, settings, environment, log of the attacks, warnings.
        complete: False while other processes still work on their shards.
        path: its JSON file; None where it was not written.

    Accuracies are in [0, 1], intervals cover 95 % (Wilson).
    """

    threat: ThreatModel
    attack: str
    label: NDArray[np.int64]
    attacked: NDArray[np.bool_]
    broken_by: NDArray[np.object_]
    meta: Mapping[str, Any]
    complete: bool = True
    path: Path | None = None

    @property
    def clean_correct(self) -> NDArray[np.bool_]:
        """bool ``[N]``: classified correctly without attack."""
        return np.not_equal(self.broken_by, CLEAN)

    @property
    def robust(self) -> NDArray[np.bool_]:
        """bool ``[N]``: correct and not broken by any attack; False where not attacked."""
        return withstood(self.broken_by) & self.attacked

    @property
    def n_clean(self) -> int:
        """Images behind the clean accuracy: all of the test set."""
        return len(self.label)

    @property
    def n_test(self) -> int:
        """Images that were attacked."""
        return int(self.attacked.sum())

    @property
    def clean_accuracy(self) -> float:
        """Share of unperturbed test images classified correctly."""
        return float(self.clean_correct.mean())

    @property
    def clean_interval(self) -> tuple[float, float]:
        """Of `clean_accuracy`."""
        return wilson_interval(self.clean_accuracy, self.n_clean)

    @property
    def attacked_accuracy(self) -> float | None:
        """Share of the attacked images still correct under `attack`; None for ``"clean"`` and while incomplete."""
        if self.attack == "clean" or not self.complete:
            return None
        return float(self.robust[self.attacked].mean())

    @property
    def robust_accuracy(self) -> float | None:
        """`attacked_accuracy` under AutoAttack standard; None under any weaker attack."""
        return self.attacked_accuracy if self.attack == "standard" else None

    @property
    def robust_interval(self) -> tuple[float, float] | None:
        """Of `attacked_accuracy`."""
        share = self.attacked_accuracy
        return None if share is None else wilson_interval(share, self.n_test)

    @property
    def apgd_accuracy(self) -> float | None:
        """Share still correct after APGD-CE, the first attack of AutoAttack standard; None where it was not run."""
        if self.attack not in ("standard", "apgd-ce") or not self.complete:
            return None
        names = self.broken_by[self.attacked]
        return float(np.mean([name not in (CLEAN, "apgd-ce") for name in names]))

    @property
    def attack_cost(self) -> int:
        """Cost of the attacks in forward-equivalents."""
        return sum(int(entry["cost"]) for entry in self.meta["log"])

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """AutoAttack's warnings, each with what it means and what to do."""
        return list(self.meta["warnings"])

    def describe(self) -> str:
        """Two lines with sizes and intervals."""

        def percent(share: float, interval: tuple[float, float]) -> str:
            return f"{share:.2%} (95 % interval {interval[0]:.1%} to {interval[1]:.1%})"

        clean = f"clean accuracy {percent(self.clean_accuracy, self.clean_interval)} on {self.n_clean:,} images"
        share, interval = self.attacked_accuracy, self.robust_interval
        if share is None or interval is None:
            return clean if self.complete else f"{clean}\n(attacks not finished: {self.n_test:,} images so far)"
        name = "robust accuracy (AutoAttack standard)" if self.attack == "standard" else f"accuracy under {self.attack}"
        subset = f"a stratified subset of {self.n_test:,} of " if self.n_test < self.n_clean else ""
        return f"{clean}\n{name} at {self.threat} {percent(share, interval)} on {subset}{self.n_clean:,} images"

    def __repr__(self) -> str:
        attacked = self.attacked_accuracy
        robust = "" if attacked is None else f", {attacked:.1%} under {self._attack_name} of {self.n_test:,}"
        warned = f", {len(self.warnings)} warnings" if self.warnings else ""
        return f"<Evaluation {self.threat}: clean {self.clean_accuracy:.1%} of {self.n_clean:,} images{robust}{warned}>"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, ...]] = [("", "accuracy", "95 % interval", "images")]
        attack = f"{self._attack_name}, {self.threat}", self.attacked_accuracy, self.robust_interval, self.n_test
        for name, share, ends, count in (("clean", self.clean_accuracy, self.clean_interval, self.n_clean), attack):
            if share is not None and ends is not None:
                rows.append((name, f"{share:.1%}", f"{ends[0]:.1%} to {ends[1]:.1%}", f"{count:,}"))
        rows += [(str(warning["flag"]), str(warning["means"])) for warning in self.warnings]
        return notebook_html(repr(self)[1:-1], np.empty(0), rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the accuracy left after each attack, with 95 % intervals; return the matplotlib axes."""
        from puma.plots import figure_style, new_axes

        axes = new_axes() if ax is None else ax
        names, steps = self.broken_by[self.attacked], [CLEAN, *self.meta["settings"]["steps"]]
        if not len(names):
            names, steps = self.broken_by, [CLEAN]
        left = np.array([np.mean([name not in steps[: k + 1] for name in names]) for k in range(len(steps))])
        ends = np.array([wilson_interval(float(share), len(names)) for share in left])
        with figure_style():
            bars = axes.bar(steps, 100 * left, yerr=100 * np.abs(ends.T - left), capsize=3)
            axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
            axes.set(ylim=(0, 100), ylabel="accuracy left, %", title=f"{self._attack_name}, {self.threat}")
        return axes

    @property
    def _attack_name(self) -> str:
        return "AutoAttack standard" if self.attack == "standard" else self.attack

    def to_json(self) -> dict[str, Any]:
        """The value of ``evaluation.json``."""
        return {
            "schema": SCHEMA,
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps, "text": str(self.threat)},
            **{name: getattr(self, name) for name in _FIGURES},
            "subset": self.n_test < self.n_clean,
            "attack_cost": self.attack_cost,
            **self.meta,
        }

    def write(self, path: Path | str) -> Evaluation:
        """Write the flags (``.parquet``, a row for every image), then ``path``, with their SHA-256; return it so."""
        path = Path(path)
        meta = {"schema": SCHEMA, "identity": self.meta["identity"], "threat": str(self.threat), "attack": self.attack}
        table = flag_table(np.arange(len(self.label)), self.label, self.broken_by, meta, self.attacked)
        with atomic_path(path.with_suffix(".parquet")) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
            digest = sha256_file(temporary)
        write_json(path, {**self.to_json(), "flags_sha256": digest}, checksum=True)
        return replace(self, path=path)

    @classmethod
    def read(cls, path: Path | str) -> Evaluation:
        """Read what `write` wrote: a run folder, or its ``evaluation.json`` (`DataError` for damaged files)."""
        path = Path(path)
        path = path / "evaluation.json" if path.is_dir() else path
        value = read_json(path)
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise DataError(f"{path} is not an evaluation of this version", why=f"its schema should be {SCHEMA!r}")
        flags = path.with_suffix(".parquet")
        what, why = f"{flags} is missing, damaged, or does not belong to {path.name}", "its SHA-256 is another one"
        broken = DataError(what, why=why, fix="evaluate again: it is put together from its shards")
        try:
            if sha256_file(flags) != value["flags_sha256"]:
                raise broken
            table = pq.read_table(flags)
            return cls(
                threat=ThreatModel(value["threat"]["norm"], value["threat"]["eps"]),
                attack=value["attack"],
                label=table["label"].to_numpy().astype(np.int64),
                attacked=table["robust"].is_valid().to_numpy(),
                broken_by=np.array(table["broken_by"].to_pylist(), dtype=object),
                meta={key: value[key] for key in _META},
                path=path,
            )
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            raise broken from None


def result_path(folder: Path, attack: str, threat: ThreatModel) -> Path:
    """Path of the result: ``evaluation.json``, with the attack in its name where that is not AutoAttack standard.

    The threat model is in its name where ``folder`` holds a result or shards of that attack for another one.
    """
    stem = "evaluation" if attack == "standard" else f"evaluation-{attack}"
    with suppress(DataError, KeyError, TypeError):
        record = folder / f"{stem}-shards" / "settings.json"
        settings = read_json(record if record.is_file() else folder / f"{stem}.json")["settings"]
        if settings["threat"] != [threat.norm, threat.eps]:
            stem += f"-{threat}".replace(":", "-").replace("/", "_")
    return folder / f"{stem}.json"


def withstood(broken_by: NDArray[np.object_]) -> NDArray[np.bool_]:
    """bool ``[N]``: classified correctly, and broken by no attack so far."""
    return np.array([name is None for name in broken_by], dtype=bool)


def flag_table(
    rows: NDArray[np.int64],
    label: NDArray[np.int64],
    broken_by: NDArray[np.object_],
    meta: Mapping[str, Any],
    attacked: NDArray[np.bool_] | None = None,
) -> pa.Table:
    """The table ``index, label, clean_correct, robust, broken_by``; ``robust`` is null where not attacked."""
    columns = {
        "index": pa.array(rows, pa.int64()),
        "label": pa.array(label, pa.int16()),
        "clean_correct": pa.array(np.not_equal(broken_by, CLEAN)),
        "robust": pa.array(withstood(broken_by), mask=None if attacked is None else ~attacked),
        "broken_by": pa.array(broken_by, pa.string()),
    }
    return pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(dict(meta), allow_nan=False).encode()})
