"""What an export says about a model: the figures of an ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puma.errors import DataError
from puma.io import read_json
from puma.threat import ThreatModel, format_eps

Interval = tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """Accuracies as shares in [0, 1], with 95 % intervals and numbers of images.

    Args:
        threat: the threat model.
        attack: ``"standard"`` for AutoAttack standard, else a weaker one.
        clean: clean accuracy.
        clean_interval: its interval.
        n_clean: images of the test set.
        attacked: accuracy under the attack, or None.
        attacked_interval: its interval, or None.
        n_test: images that the attack judged.
        warnings: AutoAttack's, each with ``flag``, ``means`` and ``do``.
        model: SHA-256 of the weights that were judged.
        seed: of the attacks.
        library: version of pyautoattack.
    """

    threat: ThreatModel
    attack: str
    clean: float
    clean_interval: Interval
    n_clean: int
    attacked: float | None
    attacked_interval: Interval | None
    n_test: int
    warnings: tuple[Mapping[str, Any], ...]
    model: str
    seed: int
    library: str

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Claim:
        """From the value of an ``evaluation.json`` (``Evaluation.to_json()``).

        Raises:
            DataError: a field is missing.
        """
        try:
            interval = value["robust_interval"]
            return cls(
                threat=ThreatModel(value["threat"]["norm"], value["threat"]["eps"]),
                attack=str(value["attack"]),
                clean=float(value["clean_accuracy"]),
                clean_interval=(value["clean_interval"][0], value["clean_interval"][1]),
                n_clean=int(value["n_clean"]),
                attacked=value["attacked_accuracy"],
                attacked_interval=None if interval is None else (interval[0], interval[1]),
                n_test=int(value["n_test"]),
                warnings=tuple(value["warnings"]),
                model=str(value["settings"]["model"]),
                seed=int(value["settings"]["seed"]),
                library=str(value["environment"]["pyautoattack"]),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise DataError("this is not the content of an evaluation.json", why=f"it lacks {error}") from None

    @classmethod
    def read(cls, path: Path | str) -> Claim:
        """From an ``evaluation.json``, or the run folder that holds it.

        Raises:
            DataError: missing or of another form.
        """
        path = Path(path)
        return cls.of(read_json(path / "evaluation.json" if path.is_dir() else path))

    @property
    def eps_text(self) -> str:
        """The radius as RobustBench writes it: "8/255" or "0.5"."""
        return format_eps(self.threat.eps, self.threat.norm)

    def check_model(self, sha256: str) -> None:
        """Refuse figures of other weights.

        Raises:
            DataError: naming both digests.
        """
        if self.model != sha256:
            raise DataError(
                f"the evaluation is of other weights ({self.model[:12]}) than the model to export ({sha256[:12]})",
                fix="evaluate the model that you export",
            )
