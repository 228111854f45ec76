"""From a results table to gaps and differences, on studies with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from puma.errors import DataError, UsageError
from puma.tradeoff import (
    Comparison,
    Flags,
    Frontier,
    compare,
    gap,
    mean_interval,
    read_runs,
    resample,
)


def row(strategy: str, seed: int, robust: float | None, clean: float, **more: object) -> dict[str, object]:
    facts = {"study": "s", "pool": "p", "recipe": "r", "checkpoint": "last", "prune_fraction": 0.0, "params": "{}"}
    return {"strategy": strategy, "seed": seed, "robust_accuracy": robust, "clean_accuracy": clean, **facts, **more}


def study(seeds: int = 3) -> list[dict[str, object]]:
    """In seed s: eps (0.3, 0.9), (0.4, 0.8), none (0.5, 0.7); beta (0.35, 0.9); puma (0.4, 0.9+s/100)."""
    rows = []
    for seed in range(seeds):
        rows += [
            row("uniform-eps", seed, 0.3, 0.9, params='{"scale": 0.5}'),
            row("uniform-eps", seed, 0.4, 0.8, params='{"scale": 0.75}'),
            row("none", seed, 0.5, 0.7, kept=100),
            row("trades-beta", seed, 0.35, 0.9, params='{"beta": 2}'),
            row("puma", seed, 0.4, 0.9 + seed / 100, params='{"c": 0.5}', prune_fraction=0.3, kept=70),
        ]
    return rows


def pick(found: list[Comparison], strategy: str) -> Comparison:
    return next(comparison for comparison in found if comparison.setting.strategy == strategy)


def test_gap_per_seed_then_mean() -> None:
    puma = pick(compare(study()), "puma")
    # at robust 0.4 the eps control has 0.8, the weight control (0.35, 0.9)-(0.5, 0.7) has 0.9 - 0.2 / 3
    reached = 0.9 - 0.2 / 3
    expected = mean_interval([0.9 + seed / 100 - reached for seed in range(3)])
    assert puma.clean_gap.estimate is not None
    assert puma.clean_gap.estimate.value == pytest.approx(expected.value)
    assert puma.clean_gap.estimate.low == pytest.approx(expected.low)
    assert (puma.clean_gap.seeds, puma.clean_gap.of, puma.clean_gap.note) == (3, 3, "")
    # at equal clean accuracy only the first seed (0.90) is inside what the controls reach
    assert puma.robust_gap.seeds == 1
    assert puma.robust_gap.estimate is not None
    assert puma.robust_gap.estimate.value == pytest.approx(0.4 - 0.35)
    assert puma.robust_gap.note.startswith(
        "1 of 3 seeds; for the others not comparable: clean accuracy 91.0 % is above"
    )
    assert puma.kept == 70
    assert puma.setting.label == "puma c=0.5 30%"


def test_differences_are_paired_by_seed() -> None:
    rows = study()
    for seed, shift in enumerate((0.0, 0.1, -0.1)):  # a seed that is easy for all arms must not widen the difference
        for entry in rows:
            if entry["seed"] == seed:
                entry["clean_accuracy"] = float(entry["clean_accuracy"]) - 0.15 + shift  # type: ignore[arg-type]
    puma = pick(compare(rows), "puma")
    assert puma.clean_difference is not None
    assert puma.clean_difference.value == pytest.approx(0.21)
    assert puma.clean_difference.high - puma.clean_difference.low < 0.06  # type: ignore[operator]
    assert puma.clean.high - puma.clean.low > 0.3  # type: ignore[operator]
    assert pick(compare(rows), "none").clean_difference is None


def test_outside_the_controls_nothing_is_said() -> None:
    rows = [*study(), *(row("difficult", seed, 0.6, 0.7) for seed in range(3))]
    difficult = pick(compare(rows), "difficult")
    assert difficult.clean_gap.estimate is None
    assert "60.0 % is above what the controls reach (30.0 to 50.0 %)" in difficult.clean_gap.note
    assert difficult.robust_gap.estimate is not None
    assert difficult.robust_gap.estimate.value == pytest.approx(0.1)
    assert "itself" in pick(compare(rows), "none").clean_gap.note


def test_without_controls_or_robust_accuracy() -> None:
    found = compare([row("none", 0, 0.5, 0.7), row("puma", 0, 0.5, 0.7)])
    assert "at least 2 points" in pick(found, "puma").clean_gap.note
    found = compare([row("none", 0, None, 0.7), row("puma", 0, None, 0.75)])
    assert pick(found, "puma").robust is None
    difference = pick(found, "puma").clean_difference
    assert difference is not None
    assert difference.value == pytest.approx(0.05)
    assert difference.low is None


def test_groups_are_never_mixed() -> None:
    rows = [*study(1), *(dict(entry, pool="q", clean_accuracy=0.1) for entry in study(1))]
    found = compare(rows)
    assert len(found) == 10
    first = next(c for c in found if c.group.pool == "p" and c.setting.strategy == "puma")
    assert first.clean_gap.estimate is not None
    assert first.clean_gap.estimate.value == pytest.approx(0.2 / 3)


def test_table_forms_read_alike() -> None:
    rows = study(2)
    arrow = pa.Table.from_pylist(rows)
    assert read_runs(rows) != []
    assert read_runs(arrow)[:4] == read_runs(arrow.to_pandas())[:4]


def test_broken_tables_are_refused() -> None:
    with pytest.raises(DataError, match="twice"):
        read_runs([row("none", 0, 0.5, 0.7), row("none", 0, 0.5, 0.7)])
    with pytest.raises(DataError, match="clean_accuracy"):
        read_runs([{"strategy": "none", "seed": 0}])
    with pytest.raises(DataError, match=r"not in \[0, 1\]"):
        read_runs([row("none", 0, 50.0, 0.7)])
    with pytest.raises(UsageError, match="did you mean 'apgd_accuracy'"):
        read_runs([], robust="apgd_acuracy")


def flags_for(rows: list[dict[str, object]], images: int = 500) -> tuple[list[dict[str, object]], dict[object, Flags]]:
    """Per-image flags that agree with the rows: an image of difficulty d is right where d < accuracy."""
    difficulty = (np.random.default_rng(0).permutation(images) + 0.5) / images
    flags = {}
    for run in read_runs(rows):
        robust = np.where(np.arange(images) < images, difficulty < run.robust, np.nan)
        flags[run.key] = Flags(difficulty < run.clean, robust)
    return rows, flags


def test_images_widen_the_interval_and_move_together() -> None:
    rows, flags = flags_for(study())
    without, with_images = (pick(compare(rows, given, draws=400), "puma") for given in (None, flags))
    assert with_images.clean.value == without.clean.value
    widths = [comparison.clean.high - comparison.clean.low for comparison in (without, with_images)]  # type: ignore[operator]
    assert widths[1] > widths[0]
    # the difference of two nested models moves only by the images between them: less than the accuracy itself would
    assert with_images.clean_difference is not None
    assert with_images.clean_difference.image_error == pytest.approx(math.sqrt(0.21 * 0.79 / 500), rel=0.15)
    assert with_images.clean_gap.estimate is not None
    assert with_images.clean_gap.estimate.image_error > 0


def test_resamples_are_the_same_for_all_runs_and_follow_the_binomial() -> None:
    key_a, key_b = (run.key for run in read_runs([row("none", 0, 0.5, 0.7), row("puma", 0, 0.5, 0.7)]))
    hits = (np.arange(400) < 300).astype(float)
    attacked = np.where(np.arange(400) % 2 == 0, hits, np.nan)
    drawn = resample({key_a: Flags(hits, attacked), key_b: Flags(hits, attacked)}, draws=2_000)
    np.testing.assert_array_equal(drawn[key_a].clean, drawn[key_b].clean)
    assert drawn[key_a].clean.mean() == pytest.approx(0.75, abs=0.005)
    assert drawn[key_a].clean.std() == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.1)
    assert drawn[key_a].robust.std() == pytest.approx(math.sqrt(0.75 * 0.25 / 200), rel=0.1)
    with pytest.raises(DataError, match="different numbers"):
        resample({key_a: Flags(hits, hits), key_b: Flags(hits[:5], hits[:5])})
    assert resample({}) == {}


def test_gap_interval_covers_the_gap_of_whole_studies() -> None:
    """2,000 simulated studies: seeds and test images drawn anew, the frontier estimated from each study's own runs."""
    rng = np.random.default_rng(5)
    covered, studies, seeds, images = 0, 2_000, 3, 300
    settings = [
        ("uniform-eps", {"scale": 0.5}, 0.30, 0.90),
        ("none", {}, 0.50, 0.70),
        ("puma", {"c": 0.5}, 0.40, 0.84),
    ]
    weights = rng.multinomial(images, np.full(images, 1 / images), size=60) / images
    for _ in range(studies):
        difficulty = rng.random((2, images))
        per_seed, again = [], []
        for _ in range(seeds):
            hits = [
                [difficulty[axis] + rng.normal(0, 0.02) < level for axis, level in enumerate(levels)]
                for *_, r, c in settings
                for levels in [(c, r)]
            ]
            points = np.array([[h.mean() for h in pair] for pair in hits])
            per_seed.append(_linear_gap(points.T[None])[0])
            again.append(_linear_gap(np.stack([[weights @ h for h in pair] for pair in hits]).transpose(2, 1, 0)))
        estimate = mean_interval(per_seed, np.stack(again, axis=1))
        covered += estimate.low <= 0.04 <= estimate.high  # type: ignore[operator]
    assert 0.95 <= covered / studies <= 0.985


def _linear_gap(points: np.ndarray) -> np.ndarray:
    """Gap of the third setting to the line through the first two; ``[B, (clean, robust), setting]``."""
    clean, robust = points[:, 0], points[:, 1]
    share = (robust[:, 2] - robust[:, 0]) / (robust[:, 1] - robust[:, 0])
    return clean[:, 2] - (clean[:, 0] + share * (clean[:, 1] - clean[:, 0]))


def test_images_part_of_a_gap_is_that_of_every_resample_done_by_hand() -> None:
    rows, flags = flags_for(study(1))
    estimate = pick(compare(rows, flags, draws=50), "puma").clean_gap.estimate
    drawn = resample(flags, draws=50)  # type: ignore[arg-type]
    settings = {run.setting.strategy + run.setting.params: drawn[run.key] for run in read_runs(rows)}
    eps = [settings[name] for name in ('uniform-eps{"scale": 0.5}', 'uniform-eps{"scale": 0.75}', "none{}")]
    weight = [settings[name] for name in ('trades-beta{"beta": 2}', "none{}")]
    puma = settings['puma{"c": 0.5}']
    by_hand = []
    for b in range(50):
        controls = [
            Frontier("control", [p.robust[b] for p in control], [p.clean[b] for p in control])
            for control in (eps, weight)
        ]
        by_hand.append(gap(puma.robust[b], puma.clean[b], controls))
    assert estimate is not None
    assert estimate.image_error == pytest.approx(np.std(by_hand, ddof=1))
    assert estimate.low is not None  # one seed: the interval shows the images only
