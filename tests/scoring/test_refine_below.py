"""A first-order estimate for every image, the full search only below a limit."""

from __future__ import annotations

import numpy as np
import pytest

import puma
from puma.errors import UsageError
from puma.margins import Status

LIMIT = 0.05


def test_only_estimates_below_the_limit_are_refined(model, pool) -> None:
    full = puma.score_margins(model, pool, batch_size=128)
    table = puma.score_margins(model, pool, refine_below=LIMIT, batch_size=128)
    fast = puma.score_margins(model, pool, mode="fast", batch_size=128)
    searched = fast.margin < LIMIT
    assert 0.05 < searched.mean() < 0.5
    np.testing.assert_array_equal(table.status == Status.ESTIMATED, ~searched)
    np.testing.assert_array_equal(table.margin[~searched], fast.margin[~searched])
    np.testing.assert_allclose(table.margin[searched], full.margin[searched], rtol=1e-4)
    np.testing.assert_array_equal(table.status[searched], full.status[searched])
    assert table.counts().keys() == {"crossed", "misclassified", "estimated"}
    assert (table.meta["mode"], table.meta["settings"]["refine_below"]) == ("refined", LIMIT)


def test_a_plan_within_the_limit_is_that_of_a_full_search(model, pool) -> None:
    threat = puma.ThreatModel("Linf", 0.4 * LIMIT)  # reached by c = 1/2 at 0.8 LIMIT
    full = puma.score_margins(model, pool, batch_size=128)
    table = puma.score_margins(model, pool, refine_below=LIMIT, batch_size=128)
    plan, exact = (puma.make_plan(one, "puma", 0.4, threat=threat) for one in (table, full))
    assert (plan.keep != exact.keep).mean() <= 0.01
    both = plan.keep & exact.keep
    np.testing.assert_allclose(plan.eps[both], exact.eps[both], atol=1e-5)


def test_killed_between_parts_and_shared_among_workers_it_gives_the_same_bytes(weights, command, tmp_path) -> None:
    words = ["score", weights, "digits?subset=120", "--threat", "Linf:0.01", "--device", "cpu", "--quiet"]
    words += ["--part-rows", 40, "--batch-size", 20]
    assert command(*words, "--out", tmp_path / "one") == 0
    for worker in (1, 0):
        share = ["--worker", worker, "--num-workers", 2]
        assert command(*words, "--out", tmp_path / "two", *share) == 0
    parts = [sorted((tmp_path / name).glob("*.parquet")) for name in ("one", "two")]
    assert len(parts[0]) == 3
    for one, two in zip(*parts, strict=True):
        assert one.read_bytes() == two.read_bytes()
    two.unlink()
    assert command(*words, "--out", tmp_path / "two") == 0
    assert two.read_bytes() == one.read_bytes()


def test_limits_that_make_no_sense(model, pool) -> None:
    with pytest.raises(UsageError, match="needs a mode that searches"):
        puma.score_margins(model, pool, mode="fast", refine_below=0.1)
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"is not a number in \(0, inf\)"):
            puma.score_margins(model, pool, refine_below=limit)


def test_the_limit_on_the_command_line(weights, command, tmp_path, capsys) -> None:
    words = ["score", weights, "digits?subset=100", "--device", "cpu", "--quiet", "--out"]

    def limit_of(name: str, *more: object) -> float | None:
        assert command(*words, tmp_path / name, *more) == 0
        return puma.MarginTable.read(tmp_path / name).meta["settings"]["refine_below"]

    assert limit_of("a") is None
    assert limit_of("b", "--threat", "Linf:8/255") == pytest.approx(16 / 255)
    assert "searched only where a first-order estimate was below 16/255" in capsys.readouterr().out
    assert limit_of("c", "--threat", "L2:0.5", "--refine-below", "0.3") == 0.3
    assert puma.MarginTable.read(tmp_path / "c").norm == "L2"
    assert limit_of("d", "--threat", "Linf:8/255", "--mode", "fast") is None
    assert limit_of("e", "--norm", "L2", "--refine-below", "1/2") == 0.5
    assert command(*words, tmp_path / "f", "--threat", "Linf:8/255", "--norm", "L2") == 2
    assert "--norm L2 contradicts --threat Linf:8/255" in capsys.readouterr().err
    assert command(*words, tmp_path / "b") == 5
    assert "settings.refine_below: " in capsys.readouterr().err
