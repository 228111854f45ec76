"""Statistics of a study: accuracies with intervals, gaps to the control frontiers, differences.

A control (a smaller uniform eps, another TRADES beta, each on all data) gives points of robust and clean accuracy; its
frontier is the undominated ones, joined by straight lines, flat below the least robust of them as far as a point was
measured; NaN beyond. Reasons: docs/statistics.md. Intervals are not scipy's: ``scipy.stats`` takes 0.5 s to import,
``binomtest`` whole hits only, and one resample of the test images has to serve all runs and both accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from puma.errors import DataError, UsageError
from puma.tradeoff.results import BASELINE, CONTROLS, Flags, Group, Results, RunKey, RunResult, Setting, read_runs

Array = NDArray[np.float64]
Axis = Literal["clean", "robust"]
Runs = Mapping[int, RunResult]  # of one setting by seed
LEVEL = 0.95  # nominal coverage of every interval
DRAWS = 1_000
MIN_POINTS = 2


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % interval; no ends where there is none (one seed, no per-image flags).

    ``seed_error`` and ``image_error`` are standard errors: of the seeds, of the choice of test images; NaN if unknown.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int
    seed_error: float = math.nan
    image_error: float = math.nan

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a share in [0, 1] seen in ``n`` images; `UsageError` outside that."""
    if not 0 <= share <= 1 or n < 1:
        raise UsageError(f"no interval of a share {share!r} of {n!r} images")
    z = float(special.ndtri((1 + LEVEL) / 2))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(values: ArrayLike, resampled: ArrayLike | None = None) -> Estimate:
    """The mean over seeds with Student's t, and the variance of the test images that all seeds share added.

    Seeds share their test images, so their spread does not show how much the images matter. The part of the variance
    under resamples that all seeds have in common is added (two-way random effects); each part has its own Student's t,
    and the half-widths add in quadrature. Coverage in simulation: docs/statistics.md. With one seed the interval shows
    the images only, or is None without resamples.

    Args:
        values: one per seed, finite ``[S]``.
        resampled: ``[B, S]``, the same under B resamples of the images; NaN where it could not be computed.

    >>> print(mean_interval([0.50, 0.52, 0.54]))
    0.520 [0.470, 0.570]

    Raises:
        UsageError: no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise UsageError("a mean over seeds needs at least one value")
    seeds = len(sample)
    between = float(sample.var(ddof=1)) / seeds if seeds > 1 else math.nan
    images, draws = _shared_variance(np.asarray(resampled, np.float64)) if resampled is not None else (math.nan, 0)
    value, errors = float(sample.mean()), (math.sqrt(between), math.sqrt(images))
    freedom = [count - 1 if count > 1 else math.nan for count in (seeds, draws)]
    halves = [float(special.stdtrit(df, (1 + LEVEL) / 2)) * error for df, error in zip(freedom, errors, strict=True)]
    half = math.hypot(*known) if (known := [half for half in halves if math.isfinite(half)]) else None
    low, high = (None, None) if half is None else (value - half, value + half)
    return Estimate(value, low, high, seeds, *errors)


def _shared_variance(resampled: Array) -> tuple[float, int]:
    """Variance over image resamples that all seeds have in common, and how many resamples could be used."""
    usable = resampled[np.isfinite(resampled).all(axis=1)]
    draws, seeds = usable.shape
    if draws < 2:
        return math.nan, draws
    of_mean = float(usable.mean(axis=1).var(ddof=1))
    if seeds == 1:
        return of_mean, draws
    of_each = float(usable.var(axis=0, ddof=1).mean())
    return max((seeds * of_mean - of_each) / (seeds - 1), 0.0), draws


class Resampled(NamedTuple):
    """A run's accuracies under each resample of the test images, float64 ``[B]``."""

    clean: Array
    robust: Array


def resample(flags: Mapping[RunKey, Flags], draws: int = DRAWS, seed: int = 0) -> dict[RunKey, Resampled]:
    """Accuracies of every run under ``draws`` bootstrap resamples of the test images.

    All runs and both accuracies share the images of a resample, so that differences keep what these have in common.

    Raises:
        DataError: the runs were not evaluated on equally many images.
    """
    if not flags:
        return {}
    lengths = {len(np.asarray(part)) for each in flags.values() for part in (each.clean, each.robust)}
    if len(lengths) != 1 or lengths == {0}:
        what = f"the runs were evaluated on different numbers of test images: {sorted(lengths)}"
        raise DataError(what, fix="evaluate all runs on the same test set")
    (images,) = lengths
    parts = ([each.clean for each in flags.values()], [each.robust for each in flags.values()])
    hits = [np.stack([np.asarray(values, np.float64) for values in part], axis=1) for part in parts]
    again, rng = (list[Array](), list[Array]()), np.random.default_rng(seed)
    block = max(1, 4_000_000 // images)  # so many resamples at a time that their weights take 32 MB
    for start in range(0, draws, block):
        weights = rng.multinomial(images, np.full(images, 1 / images), size=min(block, draws - start)).astype(float)
        for drawn, values in zip(again, hits, strict=True):
            known = np.isfinite(values)
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn.append((weights @ np.where(known, values, 0)) / (weights @ known.astype(float)))
    clean, robust = map(np.concatenate, again)
    return {key: Resampled(clean[:, i], robust[:, i]) for i, key in enumerate(flags)}


class Frontier:
    """The measured points of one control: finite robust and clean accuracies ``[P]``, in any order, or a `UsageError`.

    >>> control = Frontier("uniform-eps", [0.2, 0.4, 0.3], [0.9, 0.7, 0.6])
    >>> control.corners
    (array([0.2, 0.4]), array([0.9, 0.7]))
    >>> control.clean_at([0.3, 0.5])
    array([0.8, nan])
    """

    def __init__(self, name: str, robust: ArrayLike, clean: ArrayLike) -> None:
        self.name, self.robust, self.clean = name, np.asarray(robust, np.float64), np.asarray(clean, np.float64)
        same = self.robust.shape == self.clean.shape and self.robust.ndim == 1
        if not same or not np.isfinite([self.robust, self.clean]).all():
            raise UsageError(f"the frontier {name!r} needs as many robust as clean accuracies, all finite")

    @cached_property
    def corners(self) -> tuple[Array, Array]:
        """The undominated points: robust accuracy rising, clean accuracy falling, both strictly."""
        order = np.lexsort((-self.clean, -self.robust))
        robust, clean = self.robust[order], self.clean[order]
        free = clean > np.concatenate([[-np.inf], np.maximum.accumulate(clean)[:-1]])
        return robust[free][::-1], clean[free][::-1]

    def clean_at(self, robust: ArrayLike) -> Array:
        """The clean accuracy the control reaches at these robust accuracies; NaN outside the measured range."""
        return self._at(robust, self.robust, *self.corners)

    def robust_at(self, clean: ArrayLike) -> Array:
        """The robust accuracy the control reaches at these clean accuracies; NaN outside the measured range."""
        robust, falling = self.corners
        return self._at(clean, self.clean, falling[::-1], robust[::-1])

    def _at(self, wanted: ArrayLike, measured: Array, x: Array, y: Array) -> Array:
        wanted = np.asarray(wanted, np.float64)
        if len(measured) < MIN_POINTS:
            return np.full(wanted.shape, np.nan)
        inside = (wanted >= measured.min()) & (wanted <= measured.max())
        return np.where(inside, np.interp(wanted, x, y), np.nan)


def gap(robust: ArrayLike, clean: ArrayLike, frontiers: Sequence[Frontier], axis: Axis = "clean") -> Array:
    """Distance above the highest frontier whose measured range covers a point, float64 ``[P]``; NaN where none does.

    ``robust`` and ``clean`` are accuracies ``[P]``. ``axis``: ``"clean"`` (clean accuracy at equal robust accuracy, the
    headline) or ``"robust"`` (robust at equal clean).

    >>> control = Frontier("uniform-eps", [0.2, 0.4], [0.9, 0.7])
    >>> gap([0.3, 0.5], [0.85, 0.85], [control]).round(3)
    array([0.05,  nan])
    """
    robust, clean = np.asarray(robust, np.float64), np.asarray(clean, np.float64)
    reached = [line.clean_at(robust) if axis == "clean" else line.robust_at(clean) for line in frontiers]
    best: Array = np.fmax.reduce([np.full(robust.shape, np.nan), *reached])
    return (clean if axis == "clean" else robust) - best


def why_not(robust: float, clean: float, frontiers: Sequence[Frontier], axis: Axis = "clean") -> str:
    """The reason a point cannot be compared; empty if it can."""
    if not np.isnan(gap(robust, clean, frontiers, axis)):
        return ""
    usable = [frontier for frontier in frontiers if len(frontier.robust) >= MIN_POINTS]
    if not usable:
        return f"not comparable: no control frontier of at least {MIN_POINTS} points"
    other, value = ("robust", robust) if axis == "clean" else ("clean", clean)
    if np.isnan(value):
        return f"not comparable: no {other} accuracy"
    ranges = [getattr(frontier, other) for frontier in usable]
    low, high = min(points.min() for points in ranges), max(points.max() for points in ranges)
    side = "above" if value > high else "below" if value < low else "between"
    name, reach = ("accuracy under attack", "clean accuracy")[other == "clean"], f"{100 * low:.1f} to {100 * high:.1f}"
    return f"not comparable: {name} {100 * value:.1f} % is {side} what the controls reach ({reach} %)"


def frontiers(points: Iterable[tuple[Setting, float, float]]) -> list[Frontier]:
    """The control frontiers among points (setting, robust, clean) of one group and seed; the baseline is in each."""
    points = [point for point in points if math.isfinite(point[1])]
    own = {name: [point for point in points if point[0].strategy in (name, BASELINE)] for name in CONTROLS}
    return [Frontier(name, [p[1] for p in found], [p[2] for p in found]) for name, found in own.items()]


@dataclass(frozen=True)
class Gap:
    """Mean distance above the higher frontier, over ``seeds`` of ``of`` seeds; ``note`` says why not over all."""

    estimate: Estimate | None
    seeds: int
    of: int
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The statistics of one setting, means over its finished ``seeds``.

    ``clean`` and ``robust`` are accuracies (robust None where it was not measured), ``clean_gap`` the clean accuracy
    above the controls at equal robust accuracy (the headline), ``robust_gap`` the other way round; the differences are
    to the baseline, paired by seed, None without common seeds. ``kept`` images were trained on, with ``mean_eps``;
    ``attack_cost`` is that of the attacks in training, in forward-equivalents.
    """

    group: Group
    setting: Setting
    seeds: tuple[int, ...]
    clean: Estimate
    robust: Estimate | None
    clean_gap: Gap
    robust_gap: Gap
    clean_difference: Estimate | None
    robust_difference: Estimate | None
    kept: float
    mean_eps: float
    attack_cost: float


def compare(
    results: Results,
    flags: Mapping[RunKey, Flags] | None = None,
    *,
    robust: str = "robust_accuracy",
    baseline: str = BASELINE,
    draws: int = DRAWS,
) -> list[Comparison]:
    """Compare all settings of a results table, inside each group (study, pool, recipe, checkpoint).

    Gaps are taken seed by seed against the frontiers of the same seed, then averaged. Errors: `read_runs`, `resample`.

    Args:
        results, robust: the table, and its column of robust accuracies; see `read_runs`.
        flags: per-image flags by `RunResult.key`; ``draws`` resamples of the test images then widen every interval.
        baseline: the strategy that differences are taken to.
    """
    comparisons, table = [], read_runs(results, robust)
    for group in dict.fromkeys(run.group for run in table):
        members, settings = [run for run in table if run.group == group], dict[Setting, dict[int, RunResult]]()
        for run in members:
            settings.setdefault(run.setting, {})[run.seed] = run
        again = resample({run.key: flags[run.key] for run in members if run.key in flags} if flags else {}, draws)
        base: Runs = next((runs for setting, runs in settings.items() if setting.strategy == baseline), {})
        clean_gaps, robust_gaps = (_gaps(settings, again, axis) for axis in ("clean", "robust"))
        for setting, runs in settings.items():
            other = base if setting.strategy != baseline else {}
            clean = _mean(runs, "clean", again) or Estimate(math.nan, None, None, len(runs))
            means = clean, _mean(runs, "robust", again), clean_gaps[setting], robust_gaps[setting]
            changes = _mean(runs, "clean", again, other), _mean(runs, "robust", again, other)
            columns = [[getattr(run, name) for run in runs.values()] for name in ("kept", "mean_eps", "attack_cost")]
            known = [[value for value in column if math.isfinite(value)] for column in columns]
            facts = (float(np.mean(column)) if column else math.nan for column in known)
            comparisons.append(Comparison(group, setting, tuple(sorted(runs)), *means, *changes, *facts))
    return comparisons


def _mean(runs: Runs, axis: str, resampled: Mapping[RunKey, Resampled], minus: Runs | None = None) -> Estimate | None:
    """Mean accuracy over the seeds, or mean difference to another setting over their common seeds."""
    values, again = list[float](), list[Array]()
    for seed, run in sorted(runs.items()):
        pair = [run] if minus is None else [run, minus[seed]] if seed in minus else []
        accuracies = [getattr(one, axis) for one in pair]
        if pair and all(map(math.isfinite, accuracies)):
            values.append(accuracies[0] - sum(accuracies[1:]))
            drawn = [getattr(resampled[one.key], axis) for one in pair if one.key in resampled]
            again += [drawn[0] - sum(drawn[1:])] if len(drawn) == len(pair) else []
    return _interval(values, again)


def _interval(values: Sequence[float], again: Sequence[Array]) -> Estimate | None:
    """Mean over seeds; with the variance of the test images where every seed has resamples."""
    resampled = np.stack(again, axis=1) if values and len(again) == len(values) else None
    return mean_interval(values, resampled) if values else None


def _gaps(settings: Mapping[Setting, Runs], resampled: Mapping[RunKey, Resampled], axis: Axis) -> dict[Setting, Gap]:
    """Mean gap of each setting over the seeds that can be compared."""
    of_seed, summary = dict[int, tuple[list[Frontier], dict[Setting, Array]]](), dict[Setting, Gap]()
    for seed in {seed for runs in settings.values() for seed in runs}:
        runs = {setting: by_seed[seed] for setting, by_seed in settings.items() if seed in by_seed}
        controls = frontiers((setting, run.robust, run.clean) for setting, run in runs.items())
        of_seed[seed] = controls, _resampled_gaps(runs, resampled, axis)
    for setting, by_seed in settings.items():
        values, again, notes, of = list[float](), list[Array](), list[str](), len(by_seed)
        if setting.is_control:
            summary[setting] = Gap(None, 0, of, "is itself a point of the control frontiers")
            continue
        for seed, run in sorted(by_seed.items()):
            controls, gaps_again = of_seed[seed]
            if note := why_not(run.robust, run.clean, controls, axis):
                notes.append(note)
                continue
            values.append(float(gap(run.robust, run.clean, controls, axis)))
            again += [gaps_again[setting]] if setting in gaps_again else []
        note = f"{len(values)} of {of} seeds; for the others {notes[0]}" if notes and values else "".join(notes[:1])
        summary[setting] = Gap(_interval(values, again), len(values), of, note)
    return summary


def _resampled_gaps(
    runs: Mapping[Setting, RunResult], resampled: Mapping[RunKey, Resampled], axis: Axis
) -> dict[Setting, Array]:
    """Gaps of one seed's runs under every resample of the test images, float64 ``[B]``; frontiers are built once.

    Empty where a control has no flags: its frontier would stand still while the others move.
    """
    drawn = {setting: resampled[run.key] for setting, run in runs.items() if run.key in resampled}
    compared = [setting for setting in drawn if not setting.is_control]
    if not compared or any(setting.is_control and setting not in drawn for setting in runs):
        return {}
    points = [s for s, again in drawn.items() if s.is_control and np.isfinite(again.robust).all()]
    robust, clean = (np.stack([getattr(drawn[s], a) for s in compared], axis=1) for a in ("robust", "clean"))
    gaps = np.empty_like(clean)
    for b in range(len(gaps)):
        controls = frontiers((s, drawn[s].robust[b], drawn[s].clean[b]) for s in points)
        gaps[b] = gap(robust[b], clean[b], controls, axis)
    return {setting: gaps[:, column] for column, setting in enumerate(compared)}
