"""What an evaluation found: accuracies with intervals, a flag for every image, and how it was done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puma.errors import DataError
from puma.evaluation.pieces import CLEAN, METADATA_KEY, flag_columns
from puma.io import atomic_path, read_json, write_json
from puma.threat import ThreatModel
from puma.tradeoff import wilson_interval

SCHEMA = "puma.evaluation/1"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's accuracies under a threat model.

    Args:
        threat: the threat model.
        attack: ``"standard"`` for AutoAttack standard, else the name of a weaker attack, or ``"clean"``.
        label: int64 ``[N]``, of every test image.
        clean_correct: bool ``[N]``.
        attacked: bool ``[N]``: judged by the attack (False outside a subset).
        robust: bool ``[N]``: correct and not broken by any attack; False where not attacked.
        broken_by: object ``[N]``: None where robust or not attacked, ``"clean"`` where misclassified without attack,
            else the attack that broke it.
        meta: settings, environment, log of the attacks, warnings.
        complete: False while other processes still work on their share.
    """

    threat: ThreatModel
    attack: str
    label: NDArray[np.int64]
    clean_correct: NDArray[np.bool_]
    attacked: NDArray[np.bool_]
    robust: NDArray[np.bool_]
    broken_by: NDArray[np.object_]
    meta: Mapping[str, Any]
    complete: bool = True

    @property
    def n_clean(self) -> int:
        """How many images the clean accuracy is of: all of the test set."""
        return len(self.label)

    @property
    def n_test(self) -> int:
        """How many images the attack judged."""
        return int(self.attacked.sum())

    @property
    def clean_accuracy(self) -> float:
        """Share of unperturbed test images classified correctly, in [0, 1]."""
        return float(self.clean_correct.mean())

    @property
    def clean_interval(self) -> tuple[float, float]:
        """95 % interval of `clean_accuracy`."""
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
        """95 % interval of `attacked_accuracy`."""
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
        """What the attacks cost, in forward-equivalents."""
        return sum(int(entry["cost"]) for entry in self.meta["log"])

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """AutoAttack's warnings, each with what it means and what to do."""
        return list(self.meta["warnings"])

    def describe(self) -> str:
        """Two lines for people, sizes and intervals included."""
        clean = f"clean accuracy {_percent(self.clean_accuracy, self.clean_interval)} on {self.n_clean:,} images"
        share, interval = self.attacked_accuracy, self.robust_interval
        if share is None or interval is None:
            return clean if self.complete else f"{clean}\n(attacks not finished: {self.n_test:,} images so far)"
        name = "robust accuracy (AutoAttack standard)" if self.attack == "standard" else f"accuracy under {self.attack}"
        size = f"on {self.n_test:,} images"
        if self.n_test < self.n_clean:
            size = f"on a stratified subset of {self.n_test:,} of {self.n_clean:,} images"
        return f"{clean}\n{name} at {self.threat} {_percent(share, interval)} {size}"

    def to_json(self) -> dict[str, Any]:
        """The value of ``evaluation.json``."""
        return {
            "schema": SCHEMA,
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps, "text": str(self.threat)},
            "attack": self.attack,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": list(self.clean_interval),
            "n_clean": self.n_clean,
            "robust_accuracy": self.robust_accuracy,
            "attacked_accuracy": self.attacked_accuracy,
            "robust_interval": None if self.robust_interval is None else list(self.robust_interval),
            "apgd_accuracy": self.apgd_accuracy,
            "n_test": self.n_test,
            "subset": self.n_test < self.n_clean,
            "attack_cost": self.attack_cost,
            **self.meta,
        }

    def write(self, stem: Path) -> None:
        """Write ``STEM.parquet`` (a row for every test image), then ``STEM.json``."""
        names = np.where(self.clean_correct, self.broken_by, CLEAN)
        table = flag_columns(np.arange(len(self.label)), self.label, names)
        robust = pa.array([bool(r) if a else None for r, a in zip(self.robust, self.attacked, strict=True)], pa.bool_())
        table = table.set_column(table.column_names.index("robust"), "robust", robust)
        meta = {"schema": SCHEMA, "identity": self.meta["identity"], "threat": str(self.threat), "attack": self.attack}
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(meta).encode()})
        with atomic_path(stem.with_suffix(".parquet")) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
        write_json(stem.with_suffix(".json"), self.to_json())

    @classmethod
    def read(cls, path: Path | str) -> Evaluation:
        """Read what `write` wrote: a run folder, or its ``evaluation.json``.

        Raises:
            DataError: missing, broken, or the two files do not belong together.
        """
        path = Path(path)
        path = path / "evaluation.json" if path.is_dir() else path
        value = read_json(path)
        if not isinstance(value, dict) or value.pop("schema", None) != SCHEMA:
            raise DataError(f"{path} is not an evaluation of this version", why=f"its schema should be {SCHEMA!r}")
        try:
            table = pq.read_table(path.with_suffix(".parquet"), page_checksum_verification=True)
            identity = json.loads((table.schema.metadata or {})[METADATA_KEY])["identity"]
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DataError(
                f"the flags beside {path} are missing or broken", why=str(error), fix="evaluate again: it is resumed"
            ) from None
        if identity != value["identity"]:
            raise DataError(f"{path} and the flags beside it are of different evaluations", fix="evaluate again")
        robust = table["robust"].to_pylist()
        names = np.array(table["broken_by"].to_pylist(), dtype=object)
        return cls(
            threat=ThreatModel(value["threat"]["norm"], value["threat"]["eps"]),
            attack=value["attack"],
            label=table["label"].to_numpy().astype(np.int64),
            clean_correct=table["clean_correct"].to_numpy(zero_copy_only=False).astype(bool),
            attacked=np.array([flag is not None for flag in robust], dtype=bool),
            robust=np.array([bool(flag) for flag in robust], dtype=bool),
            broken_by=names,
            meta={key: value[key] for key in ("identity", "settings", "environment", "log", "warnings", "checkpoint")},
        )


def _percent(share: float, interval: tuple[float, float]) -> str:
    return f"{share:.2%} (95 % interval {interval[0]:.1%} to {interval[1]:.1%})"
