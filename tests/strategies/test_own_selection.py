"""Plans from a selection of the user's own: `Plan.from_indices` and `puma plan --from-file`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from score_tables import make_table
from typer.testing import CliRunner

import puma
from puma.cli.app import app
from puma.errors import DataError, UsageError
from puma.plan import Plan

POOL = puma.Pool([puma.load_dataset("digits?subset=20")])
THREAT = "Linf:0.1"


def test_indices_masks_and_eps() -> None:
    kept = [7, 0, 3]
    plan = Plan.from_indices(POOL, kept, eps=[0.01, 0.02, 0.03], threat=THREAT)
    assert np.flatnonzero(plan.keep).tolist() == sorted(kept)
    assert plan.eps[kept] == pytest.approx([0.01, 0.02, 0.03])
    assert plan.eps.sum() == pytest.approx(0.06)
    masked = Plan.from_indices(POOL, plan.keep, threat=THREAT)
    assert np.array_equal(masked.keep, plan.keep)
    assert masked.mean_eps == pytest.approx(0.1)
    every = Plan.from_indices(POOL, plan.keep, eps=np.linspace(0, 0.1, 20), threat=THREAT)
    assert every.eps[kept] == pytest.approx(np.linspace(0, 0.1, 20)[kept])
    POOL.check_plan(plan)


def test_it_is_read_back_and_trained_on(tmp_path: Path) -> None:
    plan = Plan.from_indices(POOL, range(12), eps=0.05, threat=THREAT)
    assert Plan.read(plan.write(tmp_path / "own.parquet")).fingerprint == plan.fingerprint
    items = puma.PlannedDataset(POOL, plan)
    assert len(items) == 12
    assert float(items[3][2]) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("keep", "eps", "words"),
    [
        ([0, 0], None, "different row numbers"),
        ([20], None, "from 0 to 19"),
        ([-1], None, "the pool has 20 rows"),
        ([], None, "no rows to keep"),
        ([0.5], None, "float64"),
        (np.ones(19, bool), None, "mask of all rows"),
        ([1, 2], [0.1, 0.1, 0.1], "shape"),
        ([1, 2], [0.1, np.nan], "NaN"),
        ([1, 2], [-0.1, 0.1], "negative"),
        ([1, 2], [8, 4], "whole pixel range"),
    ],
)
def test_what_is_no_selection_is_refused(keep: object, eps: object, words: str) -> None:
    with pytest.raises((DataError, UsageError), match=words):
        Plan.from_indices(POOL, keep, eps, threat=THREAT)  # type: ignore[arg-type]


def test_the_command_reads_four_kinds_of_files(tmp_path: Path) -> None:
    table = make_table(np.linspace(0.01, 0.2, 20), [0, 1] * 10)
    table.write(tmp_path / "margins")
    (tmp_path / "rows.txt").write_text("1\n4\n")
    np.save(tmp_path / "rows.npy", np.array([1, 4]))
    pd.DataFrame({"index": [1, 4], "eps": [0.03, 0.04]}).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame({"index": [1, 4], "eps": [0.03, 0.04]}).to_parquet(tmp_path / "rows.parquet")
    for name, eps in (("txt", 0.1), ("npy", 0.1), ("csv", 0.035), ("parquet", 0.035)):
        out = tmp_path / f"{name}.parquet"
        words = ["plan", "--table", tmp_path / "margins", "--threat", THREAT, "--from-file", tmp_path / f"rows.{name}"]
        result = CliRunner().invoke(app, [*map(str, words), "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert "2 of 20 images kept" in result.output
        plan = Plan.read(out)
        assert np.flatnonzero(plan.keep).tolist() == [1, 4]
        assert plan.mean_eps == pytest.approx(eps)
