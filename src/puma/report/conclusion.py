"""The verdict of a study in plain sentences with numbers: both comparisons, the saving of data, the regime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puma.report.study_data import ATTACKS, DRAWS, StudyData
from puma.report.tables import show
from puma.tradeoff import BASELINE, Comparison, Estimate, Gap, compare, redundant

PUBLISHED = "CIFAR-10 at 8/255 with a WRN-28-10: about 8 %, 30 % and 0.7"
"""The regime of published results, for comparison."""


@dataclass(frozen=True)
class Verdict:
    """Sentences about a study; a strategy's name stands between backticks.

    Args:
        headline: the strategy against training on everything at full eps, and against the free controls.
        data: what can be said about training on less data; empty if nothing can.
        regime: the numbers that say whether the comparison means anything.
        warnings: what must be known before a number is quoted.
    """

    headline: str
    data: str = ""
    regime: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """All of it, in order of importance."""
        return [text for text in (self.headline, self.data, self.regime, *self.warnings) if text]

    def __str__(self) -> str:
        return "\n".join(self.sentences).replace("`", "")


def verdict(study: StudyData | Path | str) -> Verdict:
    """The verdict of a study's folder, from its ``results.parquet`` and what lies beside it.

    Raises:
        DataError: there is no ``results.parquet``, or it is broken.
    """
    data = study if isinstance(study, StudyData) else StudyData(Path(study))
    if not data.rows:
        return Verdict("No run of this study is finished yet.")
    if not data.entries:
        return Verdict("No run was attacked, so there is no trade-off to show.")
    subject, regime, warnings = data.subject, _regime(data), tuple(_warnings(data))
    if subject is None:
        return Verdict(
            "Only `none` and the free controls are finished: no strategy to compare yet.", "", regime, warnings
        )
    strict = data.standard.find(subject.setting) if data.standard else None
    if not data.standard or not strict:
        headline = f"{_paper(data, subject)} {_controls(data, subject)}"
        return Verdict(headline, _less_data(data, subject), regime, warnings)
    # AutoAttack standard leads where it was run; controls that only have the screen are compared under it
    whole = strict.clean_gap.estimate is not None and strict.clean_gap.seeds == strict.clean_gap.of
    controls = _controls(data.standard, strict) if whole else _controls(data, subject)
    screen = (
        f"All runs under a screen, {ATTACKS[data.column]}, which is weaker than AutoAttack: {_paper(data, subject)}"
    )
    return Verdict(
        f"{_paper(data.standard, strict)} {controls}", f"{screen} {_less_data(data, subject)}", regime, warnings
    )


def side(gap: Gap) -> str:
    """A gap in words: on which side of the free controls its interval lies."""
    if gap.estimate is None:
        return "not comparable"
    if gap.estimate.low is None or gap.estimate.high is None:
        return "no interval"
    if gap.estimate.low > 0:
        return "above"
    return "below" if gap.estimate.high < 0 else "no difference shown"


def points(estimate: Estimate | None, of: str = "") -> str:
    """A difference in percentage points with its interval.

    >>> points(Estimate(0.041, 0.032, 0.050, 5), "clean"), points(None, "clean")
    ('clean +4.1 points [+3.2, +5.0]', 'clean: not known')
    """
    if estimate is None:
        return f"{of}: not known"
    value = f"{of} {show(estimate.value, 'points')} points".strip()
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{show(estimate.low, 'points')}, {show(estimate.high, 'points')}]"


def _paper(data: StudyData, subject: Comparison) -> str:
    """The paper's comparison."""
    fewer = 1 - subject.kept / data.pool_size(subject.group)
    images = f"{100 * fewer:.0f} % fewer images" if fewer > 0.005 else "all images"
    start, name = f"`{data.labels[subject.setting]}` with {images}:", robust_name(data)
    if subject.clean_difference is None or subject.robust_difference is None:
        clean, attacked = (show(data.accuracy(subject, axis).value, "percent") for axis in ("clean", "robust"))
        return f"{start} clean {clean} %, {name} {attacked} %; `{BASELINE}` is not finished yet."
    changes = f"{points(subject.clean_difference, 'clean')} and {points(subject.robust_difference, name)}"
    return f"{start} {changes} against training on everything at full eps."


def _controls(data: StudyData, subject: Comparison) -> str:
    """The free controls."""
    gap, controls = subject.clean_gap, "the free controls (all data with a smaller eps or another TRADES beta)"
    if not data.controls:
        return f"{controls[0].upper()}{controls[1:]} were not run."
    if gap.estimate is None:
        return f"Against {controls}: {gap.note}."
    some = "" if gap.seeds == gap.of else f", {gap.seeds} of {gap.of} seeds"
    equal = "robustness" if data.column == "robust_accuracy" else f"accuracy {robust_name(data)}"
    return f"Against {controls}: {points(gap.estimate, 'clean')} at equal {equal}, {side(gap)}{some}."


def _less_data(data: StudyData, subject: Comparison) -> str:
    """What random pruning of the same share says about the pool, and the subject against it."""
    fraction, robust = subject.setting.prune_fraction, robust_name(data)
    if not fraction or subject.setting.strategy == "random":
        return ""
    random = data.entry("random", fraction)
    if random is None:
        return "Less data: `random` at the same share was not run, so nothing can be said about a saving."
    losses = [random.clean_difference, random.robust_difference]
    loss = f"random pruning of the same share: {points(losses[0], 'clean')} and {points(losses[1], robust)}"
    if all(redundant(change) for change in losses):
        return f"Less data: {loss}, next to nothing. The pool is redundant: no saving of data can be shown on it."
    if all(change is not None and change.high is not None and change.high >= 0 for change in losses):
        return f"Less data: {loss}. That is no loss that could be shown, so no saving of data can be claimed here."
    pair = [(entry.setting.strategy, entry.setting.params, fraction) for entry in (random, subject)]
    rows = [r for r in data.rows_of(subject.group) if (r["strategy"], r["params"], r["prune_fraction"]) in pair]
    against = compare(rows, data.flags, robust=data.column, baseline="random", draws=DRAWS)
    mine = next(entry for entry in against if entry.setting == subject.setting)
    return (
        f"Less data: {loss}. `{data.labels[subject.setting]}` against it, at equally many images: "
        f"{points(mine.clean_difference, 'clean')} and {points(mine.robust_difference, robust)}."
    )


def _regime(data: StudyData) -> str:
    regime = data.regime
    parts = []
    if regime.margin_error is not None:
        parts.append(f"the margin model misclassifies {100 * regime.margin_error:.1f} % of the pool")
    if regime.below_eps is not None:
        parts.append(f"{100 * regime.below_eps:.0f} % of it have 0 < margin < eps")
    if regime.ratio is not None:
        parts.append(f"`{BASELINE}` has robust / clean {regime.ratio:.2f}")
    if not parts:
        return ""
    unknown = "" if regime.smaller_eps else "; no smaller uniform eps beats it in both accuracies"
    return f"Regime: {', '.join(parts)}{unknown if regime.ratio is not None else ''} ({PUBLISHED})."


def _warnings(data: StudyData) -> list[str]:
    warnings = []
    if data.column != "robust_accuracy" and not data.standard:
        attack = ATTACKS[data.column]
        warnings.append(f"AutoAttack standard was not run: accuracy under {attack} is a screen, not robust accuracy.")
    if data.regime.smaller_eps:
        warnings.append(
            f"All data with uniform {data.regime.smaller_eps} beats `{BASELINE}` in both accuracies: this eps is too "
            "large for the data, and the comparison with `none` says little about a strategy."
        )
    if data.seeds == 1:
        warnings.append(
            "One seed: intervals show the choice of test images only; a difference may be luck of the seed."
        )
    return warnings


def robust_name(data: StudyData) -> str:
    """What the accuracy under attack may be called."""
    return "robust" if data.column == "robust_accuracy" else f"under {ATTACKS[data.column]}"
